"""Regions of a graph: what they hold, what they write, and their meaning as loops, alone and between compiled parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moec.capture.lower import RegionLoop, lower_regions
from moec.capture.parts import compile_parts
from moec.capture.region import Malformed, hoist_invariants, regions

M = torch.ops.moec


class Routed(nn.Module):
    def __init__(self, experts=3):
        super().__init__()
        self.gate = nn.Linear(8, experts)
        self.up = nn.Parameter(torch.randn(experts, 8, 8))

    def forward(self, x):
        x = torch.tanh(x)
        idx = self.gate(x).argmax(-1)
        y, seen = torch.zeros_like(x), torch.zeros(x.shape[0])
        for e in idx.unique():
            rows = torch.where(idx == e)[0]
            if rows.numel() == 0:
                continue
            y.index_add_(0, rows, x[rows] @ self.up[e])
            seen = seen.index_add(0, rows, torch.ones_like(rows, dtype=seen.dtype))
        return y.relu(), seen


def capture(recorder, tokens=5):
    torch.compile(Routed(), backend=recorder, dynamic=True)(torch.randn(tokens, 8))
    return recorder.graphs[0]


def test_what_a_region_tells(make_recorder):
    held = []
    recorder = make_recorder(lambda gm: (held.extend(regions(gm)), lower_regions(gm).forward)[1])
    names = []

    def finish(gm):
        (region,) = regions(gm)
        held.append(region)
        names.extend(node.name for node in region.accumulators)
        assert not region.over_range
        assert [n.target for n in region.skips] == [M.skip_size.default]
        assert [n.target for n in region.effects] == ["index_add_"]
        assert len(region.carries) == 1
        assert set(region.inputs) >= set(region.accumulators)
        return lower_regions(gm).forward

    recorder = make_recorder(finish)
    capture(recorder)
    assert names == ["y"]


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_parts_compiled_by_inductor(tokens, make_recorder):
    parts = []

    def compile_fn(part, examples):
        from torch._inductor.compile_fx import compile_fx

        parts.append(part)
        return compile_fx(part, examples)

    recorder = make_recorder(lambda gm: compile_parts(gm, compile_fn))
    model, x = Routed(), torch.randn(tokens, 8)
    compiled = torch.compile(model, backend=recorder)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, got = model(a), compiled(b)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(got[1], torch.ones(tokens))
    if tokens:
        expected[0].sum().backward()
        wanted = [a.grad, *(p.grad for p in model.parameters())]
        model.zero_grad()
        got[0].sum().backward()
        for p, q in zip(wanted, [b.grad, *(p.grad for p in model.parameters())], strict=True):
            assert (p is None) == (q is None)
            if p is not None:
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert len(parts) == 2
    assert all("ops.moec" not in part.code for part in parts)


def test_no_grad_around_the_loop_and_after(make_recorder):
    class Frozen(Routed):
        def forward(self, x):
            with torch.no_grad():
                y, _ = super().forward(x)
            return y * x

    recorder = make_recorder(lambda gm: compile_parts(gm, lambda part, examples: part.forward))
    model, x = Frozen(), torch.randn(5, 8, requires_grad=True)
    got = torch.compile(model, backend=recorder)(x)
    assert torch.is_grad_enabled()
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert torch.equal(grad, model(torch.ones_like(x) * x) * 0 + Routed.forward(model, x)[0].detach())
    assert len(recorder.graphs) == 1


@pytest.mark.parametrize("written", ["whole", "made"])
def test_a_shape_that_is_asked_for_before_the_loop_and_used_after_it(written, make_recorder):
    from torch._inductor.compile_fx import compile_fx

    class Batched(Routed):
        def forward(self, x):
            shape = x.shape if written == "whole" else (*x.shape[:1], -1, 8)
            y, _ = super().forward(x.reshape(-1, x.shape[-1]))
            return y.reshape(shape)

    recorder = make_recorder(lambda gm: compile_parts(gm, compile_fx))
    model = Batched()
    compiled = torch.compile(model, backend=recorder, dynamic=True)
    for shape in ((2, 5, 8), (3, 4, 8)):
        a = torch.randn(shape, requires_grad=True)
        b = a.detach().clone().requires_grad_()
        expected, got = model(a), compiled(b)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        expected.square().sum().backward()
        got.square().sum().backward()
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5)
    assert len(recorder.graphs) == 1


def test_graph_without_regions_is_one_part():
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    for node in gm.graph.nodes:
        node.meta["example_value"] = torch.ones(1, 2)
    seen = []
    compile_parts(gm, lambda part, examples: seen.append((part, len(examples))) or part.forward)
    assert seen == [(gm, 1)]


def marked(body):
    graph = torch.fx.Graph()
    items = graph.placeholder("items")
    body(graph, items)
    return torch.fx.GraphModule(nn.Module(), graph)


def test_region_without_end():
    gm = marked(lambda g, items: g.output(g.call_function(M.anchor.default, (items,))))
    with pytest.raises(Malformed, match="does not end"):
        regions(gm)


def test_value_that_escapes():
    def body(graph, items):
        item = graph.call_function(M.anchor.default, (items,))
        double = graph.call_function(torch.add, (item, item))
        graph.call_function(M.end.default, (item,))
        graph.output(double)

    gm = marked(body)
    (region,) = regions(gm)
    with pytest.raises(Malformed, match="used after the loop"):
        hoist_invariants(gm.graph, region)


def test_loop_runs_items_in_order():
    def body(graph, items):
        total = graph.placeholder("total")
        item = graph.call_function(M.anchor.default, (items,))
        head = graph.call_function(M.carry.default, (total, item))
        odd = graph.call_function(torch.remainder, (item, 2))
        graph.call_function(M.skip.default, (item, odd))
        twice = graph.call_function(torch.mul, (head, 2))
        new = graph.call_function(torch.add, (twice, item))
        out = graph.call_function(M.yield_.default, (head, new, item))
        graph.call_function(M.end.default, (item,))
        graph.output(out)

    gm = lower_regions(marked(body))
    assert any(isinstance(module, RegionLoop) for module in gm.modules())
    assert gm(torch.tensor([4, 3, 2, 1, 6]), torch.tensor(1)).item() == ((1 * 2 + 4) * 2 + 2) * 2 + 6
    assert gm(torch.tensor([], dtype=torch.int64), torch.tensor(1)).item() == 1


def test_markers_refuse_real_tensors():
    with pytest.raises(RuntimeError, match="only graphs"):
        M.take.default(torch.ones(2, 2), torch.tensor(0))
