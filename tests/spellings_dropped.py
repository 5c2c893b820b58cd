"""Ways to write capacity routing, continued: places by priority, drops by weights, in a loop, passed tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spelling import E, H, K, Listed, Mlp, Routed, Spelling, batches, tokens
from torch import nn


class Prioritised(Routed):
    """Tokens queue by their largest weight: masks are made in that order, places are put back by a scatter."""

    def forward(self, x):
        capacity = max(1, math.ceil(self.factor * K * x.shape[0] / E))
        w, chosen = self.choose(x)
        order = w.amax(-1).argsort(descending=True)
        hot = F.one_hot(chosen[order], E)
        flat = hot.transpose(0, 1).reshape(-1, E)
        rank = ((flat.cumsum(0) - 1) * flat).sum(-1).view(K, -1).t()
        place = torch.empty_like(rank).scatter_(0, order[:, None].expand_as(rank), rank)
        kept = place < capacity
        seat = F.one_hot(place.clamp(max=capacity - 1), capacity) * kept[..., None]
        table = torch.einsum("tke,tkc->tec", F.one_hot(chosen, E).to(x) * w[..., None], seat.to(x))
        rows = torch.einsum("tec,th->ech", (table > 0).to(x), x)
        return torch.einsum("tec,ech->th", table, self.experts(rows))


class PriorityBack(Routed):
    """The same by the inverse permutation, argsort of argsort, for one choice."""

    def forward(self, x):
        capacity = max(1, int(self.factor * x.shape[0] / E))
        p = F.softmax(self.router(x), dim=-1)
        gate, chosen = p.max(dim=-1)
        order = torch.argsort(gate, descending=True)
        back = torch.argsort(order)
        sorted_mask = F.one_hot(chosen, E)[order]
        place = (torch.cumsum(sorted_mask, 0) - sorted_mask)[back]
        mask = F.one_hot(chosen, E)
        mask = mask * (place < capacity)
        at = (place * mask).sum(-1)
        combine = (gate[:, None] * mask).unsqueeze(-1) * F.one_hot(at, capacity).unsqueeze(1)
        rows = torch.einsum("tec,th->ech", combine.bool().to(x), x)
        return torch.einsum("tec,ech->th", combine, self.experts(rows))


class SortedTokens(Routed):
    """x itself is sorted by importance, routed in that order, and the result is put back."""

    def forward(self, x):
        importance = F.softmax(self.router(x), dim=-1).amax(-1)
        order = importance.argsort(dim=0, descending=True)
        y = self.route(x[order])
        return torch.zeros_like(y).index_copy(0, order, y)

    def route(self, x):
        capacity = max(2, math.ceil(self.factor * K * x.shape[0] / E))
        w, chosen = self.choose(x)
        hot = F.one_hot(chosen, E)
        flat = hot.view(-1, E)
        place = ((flat.cumsum(0) - 1) * flat).sum(-1).view(-1, K)
        seat = (place[..., None] == torch.arange(capacity, device=x.device)).to(x.dtype)
        table = torch.einsum("tk,tke,tkc->tec", w, hot.to(x.dtype), seat)
        rows = torch.einsum("tec,th->ech", torch.einsum("tke,tkc->tec", hot.to(x.dtype), seat), x)
        return torch.einsum("tec,ech->th", table, self.experts(rows))


class WeightsCut(Routed):
    """Drops only cut weights; every expert runs on every token."""

    def forward(self, x):
        capacity = int(self.factor * x.shape[0] * K / E) + 1
        w, chosen = self.choose(x)
        hot = F.one_hot(chosen.reshape(-1), E)
        place = (hot.cumsum(0).mul(hot).sum(-1) - 1).view_as(chosen)
        w = w * (place < capacity).to(w.dtype)
        gates = torch.zeros(x.shape[0], E).scatter_add(1, chosen, w)
        h = torch.einsum("th,ehf->tef", x, self.experts.w1).relu()
        return torch.einsum("te,teh->th", gates, torch.einsum("tef,efh->teh", h, self.experts.w2))


class WeightsRenormalised(WeightsCut):
    """What is left of a token's weights adds up to one again."""

    def forward(self, x):
        capacity = int(self.factor * x.shape[0] * K / E) + 1
        w, chosen = F.softmax(self.router(x), dim=-1).topk(K, dim=-1)
        hot = F.one_hot(chosen.reshape(-1), E)
        place = (hot.cumsum(0) - 1).gather(1, chosen.reshape(-1, 1)).view_as(chosen)
        w = torch.where(place < capacity, w, torch.zeros_like(w))
        w = w / w.sum(-1, keepdim=True).clamp(min=1e-9)
        gates = torch.zeros(x.shape[0], E).scatter(1, chosen, w)
        h = torch.einsum("th,ehf->etf", x, self.experts.w1).relu()
        return (torch.bmm(h, self.experts.w2) * gates.t()[..., None]).sum(0)


class LoopOfMlps(nn.Module):
    """A router and a list of MLPs, for loops."""

    def __init__(self, factor=1.0, k=K):
        super().__init__()
        self.gate, self.factor, self.k = nn.Linear(H, E, bias=False), factor, k
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def seats(self, count):
        """C."""
        return max(1, math.ceil(self.factor * self.k * count / E))


class ChoiceCut(LoopOfMlps):
    """The dropped get expert E, which no loop reaches."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        hot = F.one_hot(chosen.t().reshape(-1), E)
        place = (hot.cumsum(0).mul(hot).sum(-1) - 1).view(self.k, -1).t()
        chosen = chosen.masked_fill(place >= self.seats(x.shape[0]), E)
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(chosen == e)
            y.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return y


class KeptLoop(LoopOfMlps):
    """The kept are a mask of pairs that joins the comparison."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        hot = F.one_hot(chosen, E)
        flat = hot.view(-1, E)
        place = ((flat.cumsum(0) - flat) * flat).sum(-1).view_as(chosen)
        kept = place < self.seats(x.shape[0])
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where((chosen == e) & kept)
            y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


class PassedOn(Routed):
    """A dropped token is its own result."""

    def forward(self, x):
        capacity = max(1, int(self.factor * x.shape[0] / E))
        gate, chosen = F.softmax(self.router(x), dim=-1).max(-1)
        mask = F.one_hot(chosen, E).to(x.dtype)
        place = (mask.cumsum(0) - 1) * mask
        mask = mask * (place < capacity).to(x.dtype)
        seat = F.one_hot((place * mask).sum(-1).long(), capacity).to(x.dtype)
        dispatch = mask.unsqueeze(-1) * seat.unsqueeze(1)
        rows = torch.einsum("tec,th->ech", dispatch, x)
        y = torch.einsum("tec,ech->th", dispatch * gate[:, None, None], self.experts(rows))
        kept = mask.sum(-1) > 0
        return torch.where(kept[:, None], y, x)


class PassedOnSum(PassedOn):
    """A dropped token is added by what its mask lacks of one."""

    def forward(self, x):
        capacity = max(1, int(self.factor * x.shape[0] / E))
        gate, chosen = F.softmax(self.router(x), dim=-1).max(-1)
        mask = F.one_hot(chosen, E)
        place = mask.cumsum(0) * mask
        mask = mask * (place <= capacity).long()
        left = mask.sum(-1)
        seat = F.one_hot(((place - 1) * mask).sum(-1), capacity)
        dispatch = (mask[:, :, None] * seat[:, None, :]).to(x.dtype)
        y = torch.einsum("tec,ech->th", dispatch, self.experts(torch.einsum("tec,th->ech", dispatch, x)))
        return y * (gate * left)[:, None] + x * (1 - left)[:, None]


class Padded(Routed):
    """Padding tokens take no seat: their masks are zero before the running count."""

    def forward(self, x):
        real = x[:, 0] > -0.8  # what a mask of the caller would be
        capacity = max(1, math.ceil(self.factor * K * x.shape[0] / E))
        w, chosen = self.choose(x)
        hot = F.one_hot(chosen, E) * real[:, None, None]
        flat = hot.transpose(0, 1).reshape(-1, E)
        place = ((flat.cumsum(0) - 1) * flat).sum(-1).view(K, -1).t()
        kept = (place < capacity) & real[:, None]
        seat = F.one_hot(place * kept, capacity).to(x.dtype) * kept[..., None]
        dispatch = torch.einsum("tke,tkc->tec", hot.to(x.dtype), seat)
        table = torch.einsum("tke,tkc->tec", hot.to(x.dtype) * w[..., None], seat)
        rows = torch.einsum("tec,th->ech", dispatch, x)
        return torch.einsum("tec,ech->th", table, self.experts(rows))


class NoisySecond(Routed):
    """The second choice by given noise; gates normalised before drops; a small second choice is left out at random."""

    experts_of = Listed

    def forward(self, x):
        logits = self.router(x)
        noise = torch.sin(17 * logits.detach())  # given, as if it had been drawn
        gates = F.softmax(logits, dim=1)
        capacity = 2 * math.ceil(self.factor * x.shape[0] / E)
        first = torch.argmax(gates, dim=1)
        mask1 = F.one_hot(first, num_classes=E)
        noisy = (logits + noise).masked_fill(mask1.bool(), float("-inf"))
        mask2 = F.one_hot(torch.argmax(noisy, dim=1), num_classes=E)
        g1, g2 = (gates * mask1).sum(dim=1), (gates * mask2).sum(dim=1)
        total = torch.clamp(g1 + g2, min=1e-6)
        g1, g2 = g1 / total, g2 / total
        draw = noise.mean(1).abs()
        mask2 = mask2 * (2 * g2 > draw).unsqueeze(-1)
        at1 = torch.cumsum(mask1, dim=0) - 1
        at2 = torch.cumsum(mask2, dim=0) - 1 + torch.sum(mask1, dim=0, keepdim=True)
        mask1 = mask1 * torch.lt(at1, capacity)
        mask2 = mask2 * torch.lt(at2, capacity)
        s1, s2 = torch.sum(at1 * mask1, dim=1), torch.sum(at2 * mask2, dim=1)
        gate1, gate2 = g1.unsqueeze(-1) * mask1.to(x.dtype), g2.unsqueeze(-1) * mask2.to(x.dtype)
        combine = gate1.unsqueeze(2) * F.one_hot(s1, capacity).unsqueeze(1)
        combine = combine + gate2.unsqueeze(2) * F.one_hot(s2, capacity).unsqueeze(1)
        rows = torch.einsum("sec,sm->ecm", combine.bool().to(x.dtype), x)
        return torch.einsum("sec,ecm->sm", combine, self.experts(rows))


class LargestCount(Routed):
    """C is the largest count: nobody is dropped."""

    def forward(self, x):
        w, chosen = self.choose(x)
        hot = F.one_hot(chosen, E)
        capacity = hot.sum((0, 1)).max()
        flat = hot.view(-1, E)
        place = ((flat.cumsum(0) - 1) * flat).sum(-1).view(-1, K)
        kept = place < capacity
        count = K * x.shape[0]
        seat = (place.unsqueeze(-1) == torch.arange(count)).to(x.dtype) * kept[..., None]
        table = torch.einsum("tke,tkc->tec", hot * w[..., None], seat)
        rows = torch.einsum("tec,th->ech", torch.einsum("tke,tkc->tec", hot.to(x.dtype), seat), x)
        return torch.einsum("tec,ech->th", table, self.experts(rows))


class TwoFactors(Routed):
    """A capacity factor for training and one for evaluation; the overflow's gate is filled with zeros."""

    def __init__(self, factor=0.6):
        super().__init__(factor)
        self.eval_factor = 2 * factor

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, H)
        factor = self.factor if self.training else self.eval_factor
        capacity = max(min(x.shape[0], math.ceil(factor * x.shape[0] / E)), 2)
        p = F.softmax(self.router(x).float(), dim=-1)
        gate, chosen = torch.max(p, dim=-1)
        mask = F.one_hot(chosen, E).to(torch.int32)
        place = torch.cumsum(mask, dim=0)
        place = torch.gather(place, 1, chosen.unsqueeze(1)).squeeze(1) - 1
        over = place >= capacity
        gate = gate.masked_fill(over, 0.0)
        seat = (chosen * capacity + place).masked_fill(over, 0)
        buffer = x.new_zeros(E * capacity, H).index_add(0, seat, x * (~over).unsqueeze(-1))
        y = self.experts(buffer.view(E, capacity, H)).view(-1, H)
        return (y[seat] * gate.unsqueeze(-1)).view(shape)


class BestWeights(Routed):
    """Drop by weight: each expert keeps the C largest weights among those who chose it."""

    def forward(self, x):
        capacity = min(x.shape[0], max(1, math.ceil(self.factor * K * x.shape[0] / E)))
        p = F.softmax(self.router(x), dim=-1)
        w, chosen = p.topk(K, dim=-1)
        gates = torch.zeros_like(p).scatter(1, chosen, w)
        _, best = gates.topk(capacity, dim=0)
        kept = torch.zeros_like(gates).scatter(0, best, 1.0)
        gates = gates * kept
        h = torch.einsum("th,ehf->tef", x, self.experts.w1).relu()
        return torch.einsum("te,teh->th", gates, torch.einsum("tef,efh->teh", h, self.experts.w2))


class Grouped(Routed):
    """Groups [G, S, H] with one running count each, capacity by group, places by a comparison, a bool dispatch."""

    def forward(self, x):
        capacity = min(x.shape[1], max(4, math.ceil(self.factor * K * x.shape[1] / E)))
        p = F.softmax(self.router(x), dim=-1)
        w, chosen = torch.topk(p, K, dim=-1)
        hot = F.one_hot(chosen, E)
        flat = hot.permute(0, 2, 1, 3).reshape(x.shape[0], -1, E)
        place = (flat.cumsum(1) * flat - 1).reshape(x.shape[0], K, -1, E).permute(0, 2, 1, 3)
        seat = (place.unsqueeze(-1) == torch.arange(capacity)) & (hot > 0).unsqueeze(-1)
        dispatch = seat.any(dim=2)
        table = (w[..., None, None] * seat.to(w)).sum(2)
        rows = torch.einsum("gsec,gsh->egch", dispatch.to(x), x)
        shape = rows.shape
        y = self.experts(rows.reshape(E, -1, H)).view(shape)
        return torch.einsum("gsec,egch->gsh", table, y)


KINDS = (
    Prioritised,
    PriorityBack,
    SortedTokens,
    WeightsCut,
    WeightsRenormalised,
    ChoiceCut,
    KeptLoop,
    PassedOn,
    PassedOnSum,
    Padded,
    NoisySecond,
    LargestCount,
    TwoFactors,
    BestWeights,
    Grouped,
)
BATCHED = (TwoFactors, Grouped)
SPELLINGS = tuple(
    Spelling(kind.__name__, "P8", lambda kind=kind: kind(0.6), batches if kind in BATCHED else tokens) for kind in KINDS
)
