"""The ops: eager, compiled with dynamic T, gradients, fallbacks with one warning, empty inputs."""

import warnings

import pytest
import torch
import torch.nn.functional as nnf

from moec.errors import BuildError, CodegenError
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.runtime import ops as runtime
from moec.runtime.calls import forget
from moec.runtime.fallback import warn_once

SPEC = str(KernelSpec(ExpertsSpec(), RouterSpec(renormalize=True)))
ONLY = str(KernelSpec(ExpertsSpec()))
H, F, E, K = 24, 20, 6, 2


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return torch.randn(E, H), [torch.randn(E, 2 * F, H) * 0.2, torch.randn(E, H, F) * 0.2]


def plain(x, w, ab, out):
    """The layer as a user writes it."""
    p = (x @ w.t()).softmax(-1)
    top, index = p.topk(K)
    top = top / top.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e in range(E):
        t, s = (index == e).nonzero(as_tuple=True)
        a, b = (x[t] @ ab[e].t()).chunk(2, -1)
        y = y.index_add(0, t, ((nnf.silu(a) * b) @ out[e].t()) * top[t, s, None])
    return y, top, index


@pytest.mark.parametrize("engine", ["auto", "cpp", "eager"])
@pytest.mark.parametrize("T", [0, 1, 7, 200])
def test_moe_op(layer, engine, T):
    w, params = layer
    x = torch.randn(T, H)
    y, logits, weights, experts = torch.ops.moec.moe(x, [w], params, K, SPEC, engine)
    want, top, index = plain(x, w, *params)
    assert torch.allclose(y, want, atol=1e-4)
    assert torch.allclose(logits, x @ w.t(), atol=1e-4)
    assert torch.equal(experts, index)
    assert torch.allclose(weights, top, atol=1e-5)


def test_strided_x_and_parameters(layer):
    w, params = layer
    x = torch.randn(H, 13).t()
    strided = [torch.randn(*p.shape[:-1], 2 * p.shape[-1])[..., ::2] for p in params]
    got = torch.ops.moec.moe(x, [w.t().contiguous().t()], strided, K, SPEC, "cpp")[0]
    assert torch.allclose(got, plain(x, w, *strided)[0], atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize("stacked", [True, False])
def test_gradients_in_eager(layer, stacked):
    _, params = layer
    spec = str(KernelSpec(ExpertsSpec(stacked=stacked)))
    x = torch.randn(13, H)
    weights, experts = torch.rand(13, K), torch.randint(0, E - 1, (13, K))  # the last expert is idle

    def run(call):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weights, *params)]
        y = call(*leaves)
        return y, torch.autograd.grad(y, leaves, torch.ones_like(y) / 3)

    def ours(x, weights, ab, out):
        flat = [ab, out] if stacked else [*ab.unbind(0), *out.unbind(0)]
        return torch.ops.moec.experts(x, weights, experts, flat, spec, "cpp")

    def theirs(x, weights, ab, out):
        a, b = torch.einsum("th,tsfh->tsf", x, ab[experts]).chunk(2, -1)
        return torch.einsum("tsf,tshf,ts->th", nnf.silu(a) * b, out[experts], weights)

    (y, got), (want_y, want) = run(ours), run(theirs)
    assert torch.allclose(y, want_y, atol=1e-4)
    for g, expected in zip(got, want, strict=True):
        assert torch.allclose(g, expected, atol=1e-4)


def test_only_what_needs_gradients_gets_them(layer):
    _, params = layer
    x, weights, experts = torch.randn(5, H), torch.rand(5, K), torch.randint(0, E, (5, K))
    params[1].requires_grad_()
    torch.ops.moec.experts(x, weights, experts, params, ONLY, "auto").sum().backward()
    assert params[0].grad is None
    assert params[1].grad.abs().sum() > 0


def test_compiled_forward_with_dynamic_tokens(layer):
    w, params = layer
    torch._dynamo.reset()

    @torch.compile(backend="inductor", fullgraph=True, dynamic=True)
    def layer_of(x):
        y, logits, _, experts = torch.ops.moec.moe(x * 1.0, [w], params, K, SPEC, "cpp")
        return y + x, logits.sum(-1), experts

    for T in (13, 1, 200):
        x = torch.randn(T, H)
        y, logits, experts = layer_of(x)
        want, _, index = plain(x, w, *params)
        assert torch.allclose(y, want + x, atol=1e-4)
        assert torch.allclose(logits, (x @ w.t()).sum(-1), atol=1e-3)
        assert torch.equal(experts, index)


@pytest.mark.parametrize("stacked", [True, False])
@torch.compiler.config.patch(force_disable_caches=True)  # without moec's backend nothing keys them on moec's source
def test_compiled_training_step_equals_plain_pytorch(layer, stacked):
    w, params = layer
    spec = str(KernelSpec(ExpertsSpec(stacked=stacked)))
    torch._dynamo.reset()

    def ours(x, w, *flat):
        top, index = (x @ w.t()).softmax(-1).topk(K)
        top = top / top.sum(-1, keepdim=True)
        y = torch.ops.moec.experts(x, top, index, list(flat), spec, "cpp")
        return (y * y).mean() + x.mean()

    # Inductor's own code is as good for few parameters as for many: one of the two shows it.
    compiled = torch.compile(ours, backend="inductor" if stacked else "aot_eager", fullgraph=True, dynamic=True)
    for T in (13, 7, 40):
        x = torch.randn(T, H)
        leaves = [t.detach().clone().requires_grad_() for t in (x, w, *params)]
        y = plain(*leaves)[0]
        loss = (y * y).mean() + leaves[0].mean()
        want = torch.autograd.grad(loss, leaves)
        mine = [t.detach().clone().requires_grad_() for t in (x, w, *params)]
        flat = mine[2:] if stacked else [p for group in mine[2:] for p in group.unbind(0)]
        got_loss = compiled(mine[0], mine[1], *flat)
        assert torch.allclose(got_loss, loss, atol=1e-5)
        for g, expected in zip(torch.autograd.grad(got_loss, mine), want, strict=True):
            assert torch.allclose(g, expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("engine", ["cpp", "cpp weights=packed"])
def test_a_parameter_is_laid_out_anew_in_the_memory_that_it_had(stacked, engine):
    spec = str(KernelSpec(ExpertsSpec(gate="separate", stacked=stacked)))
    a, b, out = params = [torch.randn(E, H, H) * 0.2 for _ in range(3)]
    x, weights, experts = torch.randn(13, H), torch.rand(13, K), torch.randint(0, E, (13, K))
    for group in (params, [a, b.transpose(1, 2), out], params):
        flat = group if stacked else [each for tensor in group for each in tensor.unbind(0)]
        want = torch.ops.moec.experts(x, weights, experts, flat, spec, "eager")
        got = torch.ops.moec.experts(x, weights, experts, flat, spec, engine)
        assert torch.allclose(got, want, atol=1e-4)


def test_float64_runs_on_the_twin(layer):
    _, params = layer
    double = [p.double() for p in params]
    x, weights, experts = torch.randn(5, H).double(), torch.rand(5, K), torch.randint(0, E, (5, K))
    y = torch.ops.moec.experts(x, weights, experts, double, ONLY, "auto")
    assert y.dtype == torch.float64


def test_ops_pass_the_checks_of_torch(layer):
    w, params = layer
    weights, experts = torch.rand(5, K), torch.randint(0, E, (5, K))
    leaves = [p.clone().requires_grad_() for p in params]
    x = torch.randn(5, H, requires_grad=True)
    done = [torch.library.opcheck(torch.ops.moec.experts.default, (x, weights, experts, leaves, ONLY, "eager"))]
    done.append(torch.library.opcheck(torch.ops.moec.moe.default, (torch.randn(5, H), [w], params, K, SPEC, "eager")))
    assert [set(checks.values()) for checks in done] == [{"SUCCESS"}] * 2


def test_without_a_compiler_the_twin_runs_with_one_warning(layer, monkeypatch):
    w, params = layer
    monkeypatch.setenv("CXX", "/nowhere/g++")
    runtime._kernel_or_warning.cache_clear()
    forget()
    warn_once.cache_clear()
    x = torch.randn(5, H)
    reason = r"eager experts instead of a kernel: CXX='/nowhere/g\+\+' names no program on the path"
    with pytest.warns(RuntimeWarning, match=reason):
        torch.ops.moec.moe(x, [w], params, K, SPEC, "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.ops.moec.moe(x, [w], params, K, str(KernelSpec(ExpertsSpec(), RouterSpec())), "auto")
    with pytest.raises(BuildError, match="CXX='/nowhere"):
        torch.ops.moec.moe(x, [w], params, K, str(KernelSpec(ExpertsSpec(), RouterSpec(scale=2.0))), "cpp")
    runtime._kernel_or_warning.cache_clear()
    warn_once.cache_clear()


def test_a_spec_without_a_kernel_says_why(layer):
    _, params = layer
    warn_once.cache_clear()
    bad = str(KernelSpec(ExpertsSpec(activation="mul(a, c)")))
    weights, experts = torch.rand(5, K), torch.randint(0, E, (5, K))
    with pytest.raises(CodegenError, match="reads c"):
        torch.ops.moec.experts(torch.randn(5, H), weights, experts, params, bad, "cpp")


def test_errors_are_ours(layer):
    w, params = layer
    with pytest.raises(CodegenError, match="needs a spec with a router"):
        torch.ops.moec.moe(torch.randn(5, H), [w], params, K, ONLY, "cpp")
    with pytest.raises(CodegenError, match=f"k={E + 1} experts a token of E={E}"):
        torch.ops.moec.moe(torch.randn(5, H), [w], params, E + 1, SPEC, "cpp")


def test_source_can_be_read():
    assert "struct Kernel" in runtime.kernel_source(SPEC)


def test_no_warnings_on_the_happy_path(layer):
    w, params = layer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.randn(3, H)
        y = torch.ops.moec.moe(x, [w], params, K, SPEC, "auto")[0]
    assert torch.allclose(y, plain(x, w, *params)[0], atol=1e-4)
