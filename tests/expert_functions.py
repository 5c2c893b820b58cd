"""Experts and routers as functions of tensors: every spelling, and near misses of each."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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


def router(fn):
    """A router of fn(p, logits)."""

    def run(p):
        return fn(p, F.linear(p["x"], p["gate"]))

    return run


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
    chosen = score.gather(1, e)
    return chosen / chosen.sum(-1, keepdim=True), e


def biased(p, logits, bias):
    score = logits.sigmoid()
    e = (score + bias).topk(K, dim=-1)[1]
    return score.gather(1, e) * 2.5, e


GOOD_ROUTERS = {
    "softmax": router(lambda p, z: tuple(F.softmax(z, -1).topk(K, -1))),
    "sigmoid bias": router(lambda p, z: biased(p, z, p["bias"])),
    "sigmoid bias row": router(lambda p, z: biased(p, z, p["bias"].unsqueeze(0))),
    "over k": router(lambda p, z: (z.topk(K)[0].softmax(-1), z.topk(K)[1])),
    "groups": router(lambda p, z: grouped_scores(p, z)),
}
NEAR_ROUTERS = {
    "softmax over tokens": router(lambda p, z: tuple(F.softmax(z, 0).topk(K, -1))),
    "smallest": router(lambda p, z: tuple(F.softmax(z, -1).topk(K, -1, largest=False))),
    "another sum": router(
        lambda p, z: ((v := z.sigmoid().topk(K))[0] / z.exp().topk(K)[0].sum(-1, keepdim=True), v[1])
    ),
    "sum over tokens": router(lambda p, z: ((v := z.sigmoid().topk(K))[0] / v[0].sum(0, keepdim=True), v[1])),
    "scaled first": router(
        lambda p, z: ((v := z.sigmoid().topk(K))[0] * 2 / ((v[0] * 2).sum(-1, keepdim=True) + 1), v[1])
    ),
    "clamped then eps": router(
        lambda p, z: ((v := z.sigmoid().topk(K))[0] / (v[0].sum(-1, keepdim=True).clamp(min=1.5) + 0.5), v[1])
    ),
    "other router": router(lambda p, z: tuple(F.softmax(F.linear(p["x"] * 2, p["gate"]), -1).topk(K, -1))),
    "other gate": router(lambda p, z: tuple(F.softmax(F.linear(p["x"], p["gate"] * 2), -1).topk(K, -1))),
    "whole numbers": router(lambda p, z: tuple(F.softmax(z.long().float(), -1).topk(K, -1))),
    "bias a token": router(lambda p, z: biased(p, z, p["x"][:, :1])),
    "interleaved groups": router(lambda p, z: grouped_scores(p, z, expand="outer")),
    "all groups": router(lambda p, z: grouped_scores(p, z, base=1.0)),
    "groups of another score": router(lambda p, z: grouped_scores(p, z, by=(-z).sigmoid())),
    "worst groups": router(lambda p, z: grouped_scores(p, z, largest=False)),
    "chosen by another": router(lambda p, z: (F.softmax(z, -1).gather(1, (e := (-z).topk(K)[1])), e)),
    "tempered": router(lambda p, z: tuple(F.softmax(z / 0.5, -1).topk(K, -1))),
    "log scores": router(lambda p, z: (z.sigmoid().topk(K)[0].sigmoid(), z.sigmoid().topk(K)[1])),
}
