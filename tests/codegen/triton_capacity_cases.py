"""Layers that drop rows over a capacity, compiled whole, in the interpreter or on a GPU (elsewhere.py).

Run by test_triton.py in its own process.
"""

import pytest
import torch
from elsewhere import DEVICE, There, moved
from moe_reference import layer, make_params, relative
from quick_interpreter import quick  # noqa: F401
from spelling import batches
from spellings_capacity import Groups, Top1, Top2
from triton_cases import ATOMIC, SORTED, kernel, with_gate

from moec.backend import Backend
from moec.ir.formulas import capacity_at
from moec.options import Options
from moec.runtime import launch as runtime_launch
from moec.runtime import reserve as runtime_reserve
from moec.runtime import triton as runtime_triton
from moec.runtime.triton import TritonKernel

OPTIONS = {"kernels": "triton", "rest": "eager", "proof": "off"}


def within(T, E, C):
    """experts[T, 2] of which no expert has more than C: the others are −1, most are at their bound."""
    experts, counts = torch.randint(0, E, (T, 2)), [0] * E
    for pair in range(2 * T):
        e = int(experts.view(-1)[pair])
        counts[e] += 1
        if counts[e] > C:
            experts.view(-1)[pair] = -1
    return experts


@pytest.mark.parametrize("config", [SORTED, ATOMIC], ids=lambda c: c.combine)
@pytest.mark.parametrize("C", [0, 1, 17])
def test_buffers_and_grids_follow_the_bound(C, config, monkeypatch):
    T, H, F, E = 40, 16, 24, 3
    spec = with_gate("concat", "nk", True, True, "output")
    params, experts = make_params(spec.experts, H, F, E), within(T, E, C)
    x, weights = torch.randn(T, H), torch.rand(T, 2)
    made = []
    run = runtime_triton.run
    monkeypatch.setattr(runtime_triton, "run", lambda b, t, r: (made.append(b.program), run(b, t, r)))
    y = kernel(spec, config).experts(x, weights, experts, params, str(C))
    shapes = {b.name: b.shape for b in made[0].buffers}
    assert shapes["h"] == (max(1, E * C), F)
    assert shapes["order"] == (max(1, E * C),)
    assert shapes["tile_expert"] == ({0: 1, 1: 3, 17: 6}[C],)
    want = layer(x, weights, experts, params, spec)
    assert torch.equal(y.double(), want) if C == 0 else relative(y, want) < 2e-6


@pytest.mark.parametrize(("model", "counts"), [(Top1, (40, 26)), (Top2, (24, 37))])
def test_a_layer_with_drops(model, counts, monkeypatch):
    """The first T is compiled as a number, the second as a symbol, and a third would be no new compile."""
    torch.manual_seed(0)
    module = model().to(DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=Backend(Options.make(OPTIONS)))
    bounds = []
    program = runtime_triton.program
    monkeypatch.setattr(runtime_triton, "program", lambda *a: (bounds.append(a[5]), program(*a))[1])
    for T in counts:
        x = moved(torch.randn(T, module.router.in_features))
        with torch.no_grad():
            got, want = compiled(x), module(x)
        got, want = (v[0] if isinstance(v, tuple) else v for v in (got, want))
        assert relative(got, want) < 1e-5
    E = module.router.out_features
    most = {Top1: lambda T: max(1, T // E), Top2: lambda T: max(4, -(-2 * T // E))}[model]
    assert bounds == [most(T) for T in counts]


def test_groups_of_tokens_that_queue_apart(monkeypatch):
    """An expert may get C rows of each group: the op's bound is of all of them."""
    torch.manual_seed(0)
    module, (x,) = Groups().to(DEVICE), map(moved, batches(12))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=Backend(Options.make(OPTIONS)))
    most, experts = [], runtime_triton.TritonKernel.experts

    def watched(self, x, weights, chosen, params, capacity, tokens):
        most.append((int(torch.bincount(chosen[chosen >= 0]).max()), capacity_at(capacity, len(x))))
        return experts(self, x, weights, chosen, params, capacity, tokens)

    monkeypatch.setattr(runtime_triton.TritonKernel, "experts", watched)
    with torch.no_grad():
        got, want = compiled(x), module(x)
    got, want = (v[0] if isinstance(v, tuple) else v for v in (got, want))
    assert relative(got, want) < 1e-5
    ((count, bound),) = most
    assert bound is not None
    assert bound % 2 == 0
    assert bound // 2 < count <= bound


@pytest.mark.parametrize("capacity", ["", "Max(4,ceiling(T/2))"])
def test_a_declared_range_takes_one_block_for_every_call(capacity, monkeypatch):
    """The same bytes whatever T is, so that the allocator and a CUDA graph see one size; beyond: one warning."""
    H, F, E = 16, 24, 3
    spec = with_gate("concat", "nk", True, True, "output")
    params, blocks, needed = make_params(spec.experts, H, F, E), [], []

    def noted(make):
        def note(built, x, size, *rest):
            if size:
                blocks.append(size)
                needed.append(built.places[1])
            return make(built, x, size, *rest)

        return note

    for name in ("_views", "_placed"):  # in the interpreter, on a GPU
        monkeypatch.setattr(runtime_launch, name, noted(getattr(runtime_launch, name)))
    triton = There(TritonKernel(spec, DEVICE))
    for T in (1, 7, 13, 40, 17):
        x, weights, experts = torch.randn(T, H), torch.rand(T, 2), within(T, E, max(4, -(-T // 2)))
        y = triton.experts(x, weights, experts, params, capacity, "1..40")
        assert relative(y, layer(x, weights, experts, params, spec)) < 2e-6
    assert len(set(blocks)) == 1
    assert max(needed) <= blocks[0]
    assert blocks[0] <= 1.5 * max(needed)
    x, weights, experts = torch.randn(41, H), torch.rand(41, 2), within(41, E, 21)
    runtime_reserve.warn_beyond.cache_clear()
    with pytest.warns(RuntimeWarning, match="more tokens than its buffers"):
        y = triton.experts(x, weights, experts, params, capacity, "1..40")
    assert relative(y, layer(x, weights, experts, params, spec)) < 2e-6
    assert len(blocks) == 5
