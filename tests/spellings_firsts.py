"""Loops whose experts take the first C of their rows alone, as people write them: by a cut, or a branch and a cut."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K, Spelling, batches, tokens
from spellings_dropped import LoopOfMlps
from torch import nn


class FirstRows(LoopOfMlps):
    """Each expert takes the first C of its rows."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        capacity = self.seats(x.shape[0])
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            token, slot = token[:capacity], slot[:capacity]
            y.index_add_(0, token, expert(x[token]) * w[token, slot].unsqueeze(-1))
        return y


class SlotsFirst(LoopOfMlps):
    """Masks [E, k, T]: an expert's first choices come before its second ones."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        mask = F.one_hot(chosen, E).permute(2, 1, 0)
        y = torch.zeros_like(x)
        for e in range(E):
            slot, token = torch.where(mask[e])
            slot, token = slot[: self.seats(x.shape[0])], token[: self.seats(x.shape[0])]
            rows = self.experts[e](x[token]) * w[token, slot, None]
            y.index_add_(0, token, rows)
        return y


class CutPairs(LoopOfMlps):
    """`nonzero` gives pairs, of which the first C are taken."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        capacity = self.seats(x.shape[0])
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            pairs = (chosen == e).nonzero()[:capacity]
            if pairs.shape[0] == 0:
                continue
            token, slot = pairs[:, 0], pairs[:, 1]
            y[token] += expert(x[token]) * w[token, slot, None]
        return y


class LeastOfBoth(LoopOfMlps):
    """The number of rows is the least of C and of what there are; rows are cut behind their index."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        capacity = self.seats(x.shape[0])
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            count = min(capacity, token.shape[0])
            rows = x[token][:count]
            y.index_add_(0, token[:count], expert(rows) * w[token, slot][:count, None])
        return y


class FlatBranch(LoopOfMlps):
    """Flat choices; where there are more than C rows, rows and weights are cut; idle experts are passed over."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        capacity = self.seats(x.shape[0])
        ids, weights = chosen.view(-1), w.view(-1)
        at = torch.arange(x.shape[0], device=x.device)[:, None].expand(-1, self.k).flatten()
        y = torch.zeros_like(x)
        for e in range(E):
            mask = ids == e
            rows, gate = at[mask], weights[mask]
            if len(rows) > capacity:
                rows = rows[:capacity]
                gate = gate[:capacity]
            if len(rows) == 0:
                continue
            y.index_add_(0, rows, self.experts[e](x[rows]) * gate.unsqueeze(-1))
        return y


class ChosenCut(LoopOfMlps):
    """One of two names for the rows; gates are a softmax over the chosen; the sum is put into x's own shape."""

    def forward(self, x):
        logits = self.gate(x)
        w, chosen = logits.topk(self.k, dim=-1)
        gates = F.softmax(torch.full_like(logits, float("-inf")).scatter(-1, chosen, w), dim=-1)
        rows, gates = x.view(-1, H), gates.view(-1, E)
        capacity = int(x.shape[0] * self.k / E * self.factor)
        y = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            mine = (chosen == i).any(dim=-1).view(-1)
            found = torch.nonzero(mine).squeeze(-1)
            kept = found[:capacity] if found.numel() > capacity else found
            if kept.numel() > 0:
                y.index_add_(0, kept, expert(rows[kept]) * gates[kept, i].unsqueeze(1))
        return x + y.view_as(x)


class CountedCut(LoopOfMlps):
    """The number of rows has a name; each token has a row with an expert, and its weight is a sum over slots."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        w = w / w.sum(-1, keepdim=True)
        capacity = self.seats(x.shape[0])
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            hit = chosen == e
            rows = torch.where(hit.any(-1))[0]
            count = rows.size(0)
            if capacity < count:
                rows = rows[:capacity]
            gate = (w * hit).sum(-1)
            y[rows] += gate[rows, None] * expert(x[rows])
        return y


class WeightsOfRows(LoopOfMlps):
    """Of a row's weights, the one whose slot chose the expert."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        capacity = self.seats(x.shape[0])
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = torch.nonzero((chosen == e).any(dim=-1), as_tuple=True)[0]
            if rows.shape[0] > capacity:
                rows = rows[:capacity]
            gate = w[rows][chosen[rows] == e]
            y.index_add_(0, rows, expert(x[rows]) * gate[:, None])
        return y


class TwoAxes(LoopOfMlps):
    """x[B, S, H]: rows are places in sequences."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        capacity = self.seats(x.shape[0] * x.shape[1])
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            b, s, slot = torch.where(chosen == e)
            b, s, slot = b[:capacity], s[:capacity], slot[:capacity]
            if b.numel() == 0:
                continue
            y[b, s] += w[b, s, slot, None] * expert(x[b, s])
        return y


class OneChoice(LoopOfMlps):
    """Switch's: one expert a token; who is dropped passes through."""

    def __init__(self, factor=1.0):
        super().__init__(factor, 1)

    def choose(self, x):
        """p[T] and the chosen[T]."""
        return F.softmax(self.gate(x), dim=-1).max(-1)


class PassedOn(OneChoice):
    """The result begins as x, which the dropped keep; all are weighted."""

    def forward(self, x):
        p, chosen = self.choose(x)
        capacity = self.seats(x.shape[0])
        y = x.clone()
        for e, expert in enumerate(self.experts):
            rows = (chosen == e).nonzero(as_tuple=True)[0]
            rows = rows[:capacity]
            y[rows] = expert(x[rows])
        return y * p[:, None]


class WeightedRows(OneChoice):
    """Each row is weighted; a copy of x is added to zeros where nobody is dropped."""

    def forward(self, x):
        p, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            rows = mine.nonzero(as_tuple=False).flatten()
            rows = rows[: self.seats(x.shape[0])]
            if rows.numel() == 0:
                continue
            y[rows] += expert(x[rows]) * p[rows].unsqueeze(1)
        return y + x


class TwoAxesPassedOn(OneChoice):
    """x[B, S, H] passes through where nobody serves a place."""

    def forward(self, x):
        p, chosen = self.choose(x)
        capacity = self.seats(x.shape[0] * x.shape[1])
        y = x.clone()
        for e, expert in enumerate(self.experts):
            b, s = torch.where(chosen == e)
            b, s = b[:capacity], s[:capacity]
            y[b, s] = expert(x[b, s]) * p[b, s, None]
        return y


class ListedRows(OneChoice):
    """Each expert's rows in a list, cut in place of it; zeros for the dropped."""

    def forward(self, x):
        p, chosen = self.choose(x)
        listed = [torch.eq(chosen, i).nonzero(as_tuple=True)[0] for i in range(E)]
        capacity = int(self.factor * len(x) / E)
        y = x.new_zeros(x.shape)
        for i in range(E):
            rows = listed[i][:capacity]
            y[rows, :] = self.experts[i](x[rows, :])
        return y * p.view(-1, 1)


class InPlace(OneChoice):
    """x's own copy is read and written."""

    def forward(self, x):
        _, chosen = self.choose(x)
        y = x * 1.0
        for e in range(E):
            rows = torch.where(chosen == e)[0]
            if rows.numel() >= 3:
                rows = rows[:3]
            y[rows] = self.experts[e](y[rows])
        return y


class MaskLoop(OneChoice):
    """A mask [T, E] cut by a running count; the loop takes the rows of each column; others pass through."""

    def forward(self, x):
        p = F.softmax(self.gate(x), dim=-1)
        mask = F.one_hot(p.argmax(-1), E)
        mask = mask * (torch.cumsum(mask, dim=0) <= self.seats(x.shape[0]))
        y = x.clone()
        for e, expert in enumerate(self.experts):
            rows = mask[:, e].bool()
            y[rows] = expert(x[rows])
        return y * p.amax(-1, keepdim=True)


class SomeExperts(OneChoice):
    """Ids from E on are of no expert: their tokens keep x."""

    def __init__(self, factor=1.0):
        super().__init__(factor)
        self.gate = nn.Linear(H, E + 2, bias=False)

    def forward(self, x):
        p, chosen = self.choose(x)
        y = x.clone()
        for e, expert in enumerate(self.experts):
            rows = torch.where(chosen == e)[0]
            y[rows] = expert(x[rows]) * p[rows, None]
        return y


class StackedCut(nn.Module):
    """Stacked weights; the kept are those of a mask made before the loop, and of them the first C."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.gate, self.factor = nn.Linear(H, E, bias=False), factor
        self.up = nn.Parameter(torch.randn(E, H, WIDTH) * 0.2)
        self.down = nn.Parameter(torch.randn(E, WIDTH, H) * 0.2)

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(K, dim=-1)
        capacity = max(1, math.ceil(self.factor * K * x.shape[0] / E))
        real = (x[:, :1] > -0.8).expand(-1, K)
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where((chosen == e) & real)
            if token.shape[0] > capacity:
                token, slot = token[:capacity], slot[:capacity]
            h = F.relu(x[token] @ self.up[e]) @ self.down[e]
            y.index_add_(0, token, h * w[token, slot, None])
        return y


KINDS = (
    FirstRows,
    SlotsFirst,
    CutPairs,
    LeastOfBoth,
    FlatBranch,
    ChosenCut,
    CountedCut,
    WeightsOfRows,
    TwoAxes,
    PassedOn,
    WeightedRows,
    TwoAxesPassedOn,
    ListedRows,
    InPlace,
    MaskLoop,
    SomeExperts,
    StackedCut,
)
BATCHED = (TwoAxes, TwoAxesPassedOn)
SPELLINGS = tuple(
    Spelling(kind.__name__, "P8", lambda kind=kind: kind(0.6), batches if kind in BATCHED else tokens) for kind in KINDS
)
