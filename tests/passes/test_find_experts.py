"""Every spelling of experts and of routers is found; every near miss still computes what eager computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moec.backend import Backend
from moec.options import Options
from moec.report import Report


@torch.library.custom_op("moec_test::groups", mutates_args=())
def groups(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows up to ends[e] times w[e]: a library's own grouped product."""
    starts = [0, *ends.tolist()[:-1]]
    return torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(zip(starts, ends.tolist(), strict=True))])


@torch.library.custom_op("moec_test::mirrored", mutates_args=())
def mirrored(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The same signature, the groups' matrices in the opposite order."""
    starts = [0, *ends.tolist()[:-1]]
    return torch.cat([x[a:b] @ w[-1 - e] for e, (a, b) in enumerate(zip(starts, ends.tolist(), strict=True))])


@groups.register_fake
def _(x, w, ends):
    return x.new_empty(x.shape[0], w.shape[2])


@mirrored.register_fake
def _(x, w, ends):
    return x.new_empty(x.shape[0], w.shape[2])


T, H, N, E, K = 12, 8, 8, 4, 2
OPTIONS = Options.make({"rest": "eager", "kernels": "eager", "verify": True})


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = dict(x=(T, H), gate=(E, H), up=(E, 2 * N, H), down=(E, H, N), other=(E, H), bias=(E,), bup=(E, 2 * N))
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def route(p):
    w, e = torch.topk(F.softmax(F.linear(p["x"], p["gate"]), dim=-1), K, dim=-1)
    return w / w.sum(-1, keepdim=True), e


def glu(h, a=0, b=1):
    parts = h.chunk(2, dim=-1)
    return F.silu(parts[a]) * parts[b]


def gathered(p, w, e, act=glu, axis=1):
    h = torch.bmm(p["up"][e.reshape(-1)], p["x"].repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1)
    h = torch.bmm(p["down"][e.reshape(-1)], act(h).unsqueeze(-1)).squeeze(-1)
    return (h * w.reshape(-1, 1)).view(T, K, H).sum(axis)


def einsums(p, w, e):
    h = glu(torch.einsum("th,tkfh->tkf", p["x"], p["up"][e]))
    return torch.einsum("tk,tkh->th", w, torch.einsum("tkf,tkhf->tkh", h, p["down"][e]))


def grouped(p, w, e, divide=K, descending=False, offsets=None, inverse="argsort", act=glu, product=groups):
    flat = e.reshape(-1)
    perm = flat.argsort(descending=descending, stable=True)
    counts = torch.histc((flat if offsets is None else offsets).float(), bins=E, min=0, max=E - 1)
    offs = counts.cumsum(0).to(torch.int32)
    h = product(p["x"][perm // divide], p["up"].transpose(1, 2), offs)
    h = product(act(h), p["down"].transpose(1, 2), offs)
    h = h * w.reshape(-1)[perm].unsqueeze(-1)
    if inverse == "argsort":
        return h[perm.argsort()].view(T, K, H).sum(1)
    if inverse == "wrong":
        return h[perm].view(T, K, H).sum(1)
    if inverse == "put":
        inv = torch.empty_like(perm)
        inv[perm] = torch.arange(T * K)
        return h[inv].view(T, K, H).sum(1)
    if inverse == "scatter":
        inv = torch.zeros_like(perm).scatter_(0, perm, torch.arange(T * K))
        return h[inv].view(T, K, H).sum(1)
    if inverse == "overwrite":
        y = torch.zeros_like(p["x"])
        y[perm // K] = y[perm // K] + h
        return y
    start = p["x"].clone() if inverse == "residual" else torch.zeros_like(p["x"])
    return start.index_add_(0, perm // K, h)


def dense(p, w, e, rest=0.0, dim=1):
    gates = torch.full((T, E), rest).scatter(1, e, w)
    h = torch.bmm(p["x"].repeat(E, 1).view(E, T, H), p["up"].transpose(1, 2))
    h = torch.bmm(glu(h), p["down"].transpose(1, 2))
    return (h * gates.t().reshape(E, T, 1)).sum(0)


def loop(p, w, e, experts=range(E), act=glu, factor=None):
    y = torch.zeros_like(p["x"])
    for i in experts:
        token, slot = torch.where(e == i)
        h = F.linear(act(F.linear(p["x"][token], p["up"][i])), p["down"][i])
        y.index_add_(0, token, h * (w if factor is None else factor)[token, slot, None])
    return y


def masks(p, w, e, skip=None):
    y = torch.zeros_like(p["x"])
    for i in range(E):
        if i == skip:
            continue
        mask = (e == i).any(-1)
        weight = (w * (e == i)).sum(-1)
        y[mask] += weight[mask].unsqueeze(-1) * F.linear(glu(F.linear(p["x"][mask], p["up"][i])), p["down"][i])
    return y


SPELLINGS = {
    "gathered bmm": gathered,
    "gathered einsum": einsums,
    "grouped": grouped,
    "grouped index_put inverse": lambda p, w, e: grouped(p, w, e, inverse="put"),
    "grouped scatter inverse": lambda p, w, e: grouped(p, w, e, inverse="scatter"),
    "grouped index_add": lambda p, w, e: grouped(p, w, e, inverse="add"),
    "grouped on a residual": lambda p, w, e: grouped(p, w, e, inverse="residual"),
    "dense": dense,
    "swapped halves": lambda p, w, e: grouped(p, w, e, act=lambda h: glu(h, 1, 0)),
    "interleaved": lambda p, w, e: gathered(p, w, e, act=lambda h: F.silu(h[:, ::2]) * h[:, 1::2]),
}

NEAR_MISSES = {
    "another k": lambda p, w, e: grouped(p, w, e, divide=3),
    "descending": lambda p, w, e: grouped(p, w, e, descending=True),
    "wrong inverse": lambda p, w, e: grouped(p, w, e, inverse="wrong"),
    "last write wins": lambda p, w, e: grouped(p, w, e, inverse="overwrite"),
    "offsets of another choice": lambda p, w, e: grouped(p, w, e, offsets=(E - 1 - e).reshape(-1)),
    "another product": lambda p, w, e: grouped(p, w, e, product=mirrored),
    "weights twice": lambda p, w, e: gathered(p, w * w, e),
    "rows weighted twice": lambda p, w, e: loop(p, w, e, act=lambda h: glu(h), factor=w * w),
    "weights of another": lambda p, w, e: gathered(p, w.flip(1), e),
    "not halves": lambda p, w, e: gathered(p, w, e, act=lambda h: F.silu(h[:, 1 : N + 1]) * h[:, N:]),
    "first half twice": lambda p, w, e: gathered(p, w, e, act=lambda h: F.silu(h[:, :N]) * h[:, :N]),
    "gates not zero": lambda p, w, e: dense(p, w, e, rest=0.1),
    "experts but one": lambda p, w, e: loop(p, w, e, experts=range(E - 1)),
    "experts but the first": lambda p, w, e: loop(p, w, e, experts=range(1, E)),
    "every second expert": lambda p, w, e: loop(p, w, e, experts=range(0, E, 2)),
    "skipped expert": lambda p, w, e: masks(p, w, e, skip=2),
    "rounded rows": lambda p, w, e: gathered(p, w, e, act=lambda h: glu(h).long().float()),
    "rounded projection": lambda p, w, e: gathered(p, w, e, act=lambda h: glu(h.long().float())),
    "softmax inside": lambda p, w, e: gathered(p, w, e, act=lambda h: glu(h).softmax(-1)),
    "weights along features": lambda p, w, e: gathered(p, w, e, act=lambda h: glu(h) * w.reshape(-1)[:N]),
    "square weights": lambda p, w, e: gathered({**p, "x": p["x"]}, w, e) * w.sum(-1, keepdim=True),
}


def routers():
    def of(fn):
        def run(p):
            logits = F.linear(p["x"], p["gate"])
            return fn(p, logits)

        return run

    def normal(w):
        return w / w.sum(-1, keepdim=True)

    def grouped_scores(p, logits, expand="inner", base=0.0, by=None, largest=True):
        score = logits.sigmoid()
        source = score if by is None else by
        best = source.view(T, 2, E // 2).topk(2, dim=-1)[0].sum(-1)
        mask = torch.full((T, 2), base).scatter(1, best.topk(1, dim=-1, largest=largest)[1], 1.0)
        if expand == "inner":
            wide = mask.unsqueeze(-1).expand(T, 2, E // 2).reshape(T, E)
        else:
            wide = mask.unsqueeze(1).expand(T, E // 2, 2).reshape(T, E)
        e = score.masked_fill(~wide.bool(), -1.0).topk(K, dim=-1)[1]
        return normal(score.gather(1, e)), e

    def biased(p, logits, bias):
        score = logits.sigmoid()
        e = (score + bias).topk(K, dim=-1)[1]
        return score.gather(1, e) * 2.5, e

    good = {
        "softmax": of(lambda p, z: tuple(F.softmax(z, -1).topk(K, -1))),
        "sigmoid bias": of(lambda p, z: biased(p, z, p["bias"])),
        "sigmoid bias row": of(lambda p, z: biased(p, z, p["bias"].unsqueeze(0))),
        "over k": of(lambda p, z: (z.topk(K)[0].softmax(-1), z.topk(K)[1])),
        "groups": of(lambda p, z: grouped_scores(p, z)),
    }
    near = {
        "softmax over tokens": of(lambda p, z: tuple(F.softmax(z, 0).topk(K, -1))),
        "smallest": of(lambda p, z: tuple(F.softmax(z, -1).topk(K, -1, largest=False))),
        "another sum": of(
            lambda p, z: ((v := z.sigmoid().topk(K))[0] / z.exp().topk(K)[0].sum(-1, keepdim=True), v[1])
        ),
        "sum over tokens": of(lambda p, z: ((v := z.sigmoid().topk(K))[0] / v[0].sum(0, keepdim=True), v[1])),
        "scaled first": of(
            lambda p, z: ((v := z.sigmoid().topk(K))[0] * 2 / ((v[0] * 2).sum(-1, keepdim=True) + 1), v[1])
        ),
        "clamped then eps": of(
            lambda p, z: ((v := z.sigmoid().topk(K))[0] / (v[0].sum(-1, keepdim=True).clamp(min=1.5) + 0.5), v[1])
        ),
        "other router": of(lambda p, z: tuple(F.softmax(F.linear(p["x"] * 2, p["gate"]), -1).topk(K, -1))),
        "other gate": of(lambda p, z: tuple(F.softmax(F.linear(p["x"], p["gate"] * 2), -1).topk(K, -1))),
        "whole numbers": of(lambda p, z: tuple(F.softmax(z.long().float(), -1).topk(K, -1))),
        "bias a token": of(lambda p, z: biased(p, z, p["x"][:, :1])),
        "interleaved groups": of(lambda p, z: grouped_scores(p, z, expand="outer")),
        "all groups": of(lambda p, z: grouped_scores(p, z, base=1.0)),
        "groups of another score": of(lambda p, z: grouped_scores(p, z, by=(-z).sigmoid())),
        "worst groups": of(lambda p, z: grouped_scores(p, z, largest=False)),
        "chosen by another": of(lambda p, z: (F.softmax(z, -1).gather(1, (e := (-z).topk(K)[1])), e)),
        "tempered": of(lambda p, z: tuple(F.softmax(z / 0.5, -1).topk(K, -1))),
        "log scores": of(lambda p, z: (z.sigmoid().topk(K)[0].sigmoid(), z.sigmoid().topk(K)[1])),
    }
    return good, near


GOOD_ROUTERS, NEAR_ROUTERS = routers()


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
