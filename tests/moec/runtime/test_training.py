"""Training through torch.compile: what is saved, what is recomputed under checkpointing, and what engines refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import moec.runtime.ops  # noqa: F401  # registers the ops
from moec.errors import CodegenError
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.runtime.backward import BackwardKernel
from moec.runtime.cpu import Kernel

H, WIDTH, E, K = 24, 20, 6, 2
SPEC = str(KernelSpec(ExpertsSpec()))


def tensors(T, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    params = [torch.randn(E, 2 * WIDTH, H, generator=g) * 0.2, torch.randn(E, H, WIDTH, generator=g) * 0.2]
    x, weights = torch.randn(T, H, generator=g), torch.rand(T, K, generator=g)
    experts = torch.rand(T, E, generator=g).topk(K).indices
    return x.to(dtype), weights.to(dtype), experts, [p.to(dtype) for p in params]


@pytest.mark.parametrize(("engine", "save", "kept"), [
    ("cpp", "always", True), ("cpp", "never", False), ("auto", "auto", True), ("eager", "always", False),
])  # fmt: skip
@pytest.mark.parametrize("T", [0, 13])
def test_what_forward_keeps_and_that_gradients_agree(engine, save, kept, T):
    x, weights, experts, params = tensors(T)
    leaves = [t.requires_grad_() for t in (x, weights, *params)]
    y, saved = torch.ops.moec.experts_training(x, weights, experts, params, SPEC, engine, save)
    assert saved.shape == ((T * K, 2 * WIDTH) if kept else (0, 0))
    assert not saved.requires_grad
    want = torch.ops.moec.experts(x, weights, experts, params, SPEC, "eager")
    g = torch.randn_like(y)
    assert torch.allclose(y, want, atol=1e-5)
    got, expected = (torch.autograd.grad(each, leaves, g) for each in (y, want))
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_training_op_passes_the_checks_of_torch():
    x, weights, experts, params = tensors(5)
    leaves = [p.requires_grad_() for p in params]
    args = (x.requires_grad_(), weights, experts, leaves, SPEC, "cpp", "always")
    done = torch.library.opcheck(torch.ops.moec.experts_training.default, args)
    assert set(done.values()) == {"SUCCESS"}


def test_an_engine_asked_for_by_name_does_not_fall_back():
    x, weights, experts, params = tensors(5, dtype=torch.float64)
    with pytest.raises(CodegenError, match=r"engine 'cpp' has kernels for x in f32, bf16 or f16 .* got float64"):
        torch.ops.moec.experts(x, weights, experts, params, SPEC, "cpp")
    with pytest.raises(CodegenError, match="got float64"):
        torch.ops.moec.experts_training(x, weights, experts, params, SPEC, "cpp", "always")
    x.requires_grad_()
    y, saved = torch.ops.moec.experts_training(x, weights, experts, params, SPEC, "auto", "always")
    assert saved.numel() == 0
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.float64
    empty = x.new_empty(0)
    with pytest.raises(CodegenError, match="got float64"):
        torch.ops.moec.experts_backward(y, x, weights, experts, params, empty, SPEC, "cpp", [True] * 4)


class Layer(nn.Module):
    """Weights gathered for each choice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Parameter(torch.randn(E, H))
        self.up, self.down = (
            nn.Parameter(torch.randn(E, 2 * WIDTH, H) * 0.2),
            nn.Parameter(torch.randn(E, H, WIDTH) * 0.2),
        )

    def forward(self, x):
        weights, chosen = torch.topk(F.softmax(F.linear(x, self.gate), dim=-1), K, dim=-1)
        a, b = torch.einsum("th,tkfh->tkf", x, self.up[chosen]).chunk(2, dim=-1)
        rows = torch.einsum("tkf,tkhf->tkh", F.silu(a) * b, self.down[chosen])
        return torch.einsum("tk,tkh->th", weights, rows)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Layer()

    def forward(self, x):
        return checkpoint(self.inner, torch.tanh(x), use_reentrant=False)


@pytest.fixture
def calls(monkeypatch):
    """(name, routing weights, experts) of every call of a kernel."""
    seen = []

    def spy(kind, method, name, at):
        original = getattr(kind, method)

        def call(self, *args):
            seen.append((name, args[at].clone(), args[at + 1].clone()))
            return original(self, *args)

        monkeypatch.setattr(kind, method, call)

    spy(Kernel, "experts", "forward", 1)
    spy(BackwardKernel, "__call__", "backward", 2)
    return seen


@pytest.mark.parametrize("rest", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("model", [Layer, Checkpointed])
def test_backward_routes_as_forward_did(model, rest, calls):
    """The choices and weights that backward is given are forward's, bit by bit, also where forward runs again."""
    torch._dynamo.reset()
    ours, theirs = model(), model()
    x = torch.randn(40, H)
    x[7] = 0.0  # a token whose experts all score the same
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled = torch.compile(ours, backend="moec", options={"rest": rest})
    compiled(mine).sum().backward()
    mine.grad = None
    ours.zero_grad()
    calls.clear()
    y = compiled(mine)
    (y * y).sum().backward()
    want = theirs(other)
    (want * want).sum().backward()
    names = [name for name, *_ in calls]
    assert names[0] == "forward"
    assert names[-1] == "backward"
    _, weights, chosen = calls[0]
    for _, w, e in calls[1:]:
        assert torch.equal(w, weights)
        assert torch.equal(e, chosen)
    assert torch.allclose(y, want, atol=1e-4)
    assert torch.allclose(mine.grad, other.grad, atol=1e-3, rtol=1e-3)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("save", "kept"), [("always", True), ("never", False), ("auto", True)])
def test_the_option_reaches_the_op(save, kept):
    torch._dynamo.reset()
    layer = Layer()
    kinds = []

    def compile_and_run():
        compiled = torch.compile(layer, backend="moec", options={"rest": "eager", "save_activations": save})
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kinds.append(tuple(t.shape)) or t, lambda t: t):
            return compiled(torch.randn(9, H))

    compile_and_run().sum().backward()
    assert ((9 * K, 2 * WIDTH) in kinds) == kept
