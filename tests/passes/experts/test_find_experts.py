"""Every spelling of experts and of routers is found; every near miss still computes what eager computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expert_functions import (
    GOOD_ROUTERS,
    NEAR_MISSES,
    NEAR_ROUTERS,
    SPELLINGS,
    E,
    H,
    K,
    T,
    gathered,
    glu,
    grouped,
    groups,
    route,
    tensors,
)

from moec.backend import Backend
from moec.options import Options
from moec.report import Report

OPTIONS = Options.make({"rest": "eager", "kernels": "eager", "verify": True})


def run(fn, p, grad=False):
    """What the compiled function computes, and the sites found."""
    report = Report()
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=Backend(OPTIONS, report=report), dynamic=False)
    if grad:
        return compiled(p), report
    with torch.no_grad():
        return compiled(p), report


def agrees(fn, p):
    got, report = run(fn, p)
    with torch.no_grad():
        want = fn(p)
    got, want = [v if isinstance(v, tuple) else (v,) for v in (got, want)]
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
    return report


def fused(report):
    return [s.status for s in report.sites]


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_found_and_right(name):
    report = agrees(lambda p: SPELLINGS[name](p, *route(p)), tensors())
    assert fused(report) == ["fused"], report


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_computes_what_eager_computes(name):
    agrees(lambda p: NEAR_MISSES[name](p, *route(p)), tensors())


@pytest.mark.parametrize("name", GOOD_ROUTERS)
def test_router_is_fused_and_right(name):
    report = agrees(lambda p: gathered(p, *GOOD_ROUTERS[name](p)), tensors())
    assert fused(report) == ["fused"], report
    assert "in the graph" not in report.sites[0].router, report
    assert report.sites[0].router


@pytest.mark.parametrize("name", NEAR_ROUTERS)
def test_near_router_computes_what_eager_computes(name):
    agrees(lambda p: gathered(p, *NEAR_ROUTERS[name](p)), tensors())


def test_weights_along_features_where_rows_and_features_are_as_many():
    def layer(p):
        w, e = route(p)
        h = torch.bmm(p["up"][e.reshape(-1)], p["x"].repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1)
        h = torch.bmm(p["down"][e.reshape(-1)], glu(h).unsqueeze(-1)).squeeze(-1)
        return (h * w.reshape(-1)).view(4, K, H).sum(1)

    p = tensors()
    p["x"] = p["x"][:4]  # T·k = H
    agrees(layer, p)


def test_double_precision_stays_double():
    agrees(lambda p: gathered(p, *route(p)), {k: v.double() for k, v in tensors().items()})


def test_router_values_that_are_returned():
    def layer(p):
        logits = F.linear(p["x"], p["gate"])
        w, e = F.softmax(logits, -1).topk(K, -1)
        return gathered(p, w, e), logits, w, e

    assert fused(agrees(layer, tensors())) == ["fused"]


def test_router_values_that_are_used_before_the_experts():
    def layer(p):
        w, e = route(p)
        total = w.sum() + e.sum()
        return gathered(p, w, e) + total, total

    assert fused(agrees(layer, tensors())) == ["fused"]


def test_two_layers_share_one_routing():
    def layer(p):
        w, e = route(p)
        y = gathered(p, w, e)
        return gathered({**p, "x": y}, w, e), grouped(p, w, e)

    assert fused(agrees(layer, tensors())) == ["fused"] * 3


def test_layer_applied_twice():
    def layer(p):
        p = {**p, "x": p["x"] + gathered(p, *route(p))}
        return p["x"] + gathered(p, *route(p))

    assert fused(agrees(layer, tensors())) == ["fused"] * 2


def test_equal_values_one_of_which_is_updated_before_the_experts():
    def layer(p):
        a, b = p["x"] * 2, p["x"] * 2
        a.add_(1)
        q = {**p, "x": b}
        return gathered(q, *route(q)) + a

    assert fused(agrees(layer, tensors())) == ["fused"]


def test_sum_seen_under_two_shapes():
    def layer(p):
        w, e = route(p)
        y = torch.zeros(T * H)
        seen = y.view(T, H)
        flat = e.reshape(-1)
        h = gathered_rows(p, w, flat)
        seen.index_add_(0, torch.arange(T).repeat_interleave(K), h)
        return y * 2, seen + 1

    def gathered_rows(p, w, flat):
        h = torch.bmm(p["up"][flat], p["x"].repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1)
        return torch.bmm(p["down"][flat], glu(h).unsqueeze(-1)).squeeze(-1) * w.reshape(-1, 1)

    agrees(layer, tensors())


@pytest.mark.parametrize("name", ["out", "x"])
def test_sum_into_an_input_changes_the_input(name):
    def layer(p):
        w, e = route(p)
        h = torch.bmm(p["up"][e.reshape(-1)], p["x"].repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1)
        h = torch.bmm(p["down"][e.reshape(-1)], glu(h).unsqueeze(-1)).squeeze(-1) * w.reshape(-1, 1)
        p[name].index_add_(0, torch.arange(T).repeat_interleave(K), h)
        return p[name] * 2, p["x"] + 1

    p, q = ({**tensors(), "out": torch.ones(T, H)} for _ in range(2))
    got, report = run(layer, p)
    assert fused(report) == ["fused"]
    torch.testing.assert_close(got, layer(q), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((p["x"], p["out"]), (q["x"], q["out"]), rtol=1e-4, atol=1e-4)


def test_one_slot_a_token_without_views():
    def layer(p):
        w, e = F.softmax(F.linear(p["x"], p["gate"]), -1).topk(1, -1)
        h = torch.bmm(p["up"][e.reshape(-1)], p["x"].repeat_interleave(1, dim=0).unsqueeze(-1)).squeeze(-1)
        h = torch.bmm(p["down"][e.reshape(-1)], glu(h).unsqueeze(-1)).squeeze(-1)
        return (h * w.reshape(-1, 1)).view(-1, 1, H).sum(1)

    assert fused(agrees(layer, tensors())) == ["fused"]


def test_one_slot_in_expert_order_is_not_in_token_order():
    def layer(p):
        w, e = F.softmax(F.linear(p["x"], p["gate"]), -1).topk(1, -1)
        flat = e.reshape(-1)
        perm = flat.argsort(stable=True)
        offs = torch.histc(flat.float(), bins=E, min=0, max=E - 1).cumsum(0).to(torch.int32)
        h = groups(glu(groups(p["x"][perm], p["up"].transpose(1, 2), offs)), p["down"].transpose(1, 2), offs)
        return (h * w.reshape(-1)[perm].unsqueeze(-1)).view(-1, 1, H).sum(1)

    agrees(layer, tensors())


@pytest.mark.parametrize("normal", [True, False])
def test_gate_learns_although_the_input_needs_no_gradient(normal):
    def layer(p):
        w, e = F.softmax(F.linear(p["x"], p["gate"]), -1).topk(K, -1)
        return gathered(p, w / w.sum(-1, keepdim=True) if normal else w, e)

    grads = []
    for compiled in (True, False):
        p = tensors()
        p["gate"].requires_grad_()
        y = run(layer, p, grad=True)[0] if compiled else layer(p)
        y.square().sum().backward()
        grads.append(p["gate"].grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)
