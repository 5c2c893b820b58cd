"""Ways to write MoE layers that small repositories and tutorials share, each beside what only looks like it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K, Spelling, batches, tokens
from spellings_strangers import Chosen
from torch import nn


class BelowKth(Chosen):
    """Scores below the k-th are −∞ before the softmax; every expert on every token."""

    def gates(self, scores):
        kth = scores.topk(K, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < kth, float("-inf")).softmax(-1)

    def forward(self, x):
        rows = torch.stack([expert(x) for expert in self.experts], dim=1)
        return torch.einsum("te,teh->th", self.gates(self.router(x)), rows)


class WhereBelowKth(BelowKth):
    """The same by `where`, with the least number there is, and a temperature; one addition after the other."""

    def gates(self, scores):
        kth = torch.topk(scores, K).values.min(dim=-1, keepdim=True).values
        low = torch.full_like(scores, torch.finfo(scores.dtype).min)
        return (torch.where(scores >= kth, scores, low) / 0.7).softmax(-1)

    def forward(self, x):
        gates = self.gates(self.router(x))
        return sum(gates[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


class SlotOfAll(Chosen):
    """Which slot chose the expert is asked of all tokens, and read at those that did."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            rows = mine.any(dim=-1)
            if not rows.any():
                continue
            slot = mine.float().argmax(dim=-1)
            y[rows] += w[rows].gather(-1, slot[rows].unsqueeze(-1)) * expert(x[rows])
        return y


class WeightOfAll(Chosen):
    """The weight at that slot is gathered for all tokens, and read at those that chose the expert."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            rows = mine.any(dim=-1)
            weight = w.gather(-1, mine.int().argmax(dim=-1, keepdim=True))
            y[rows] += weight[rows] * expert(x[rows])
        return y


class OneSlot(Chosen):
    """One expert a token by a top-k, whose axis of one slot is dropped from the mask; weights keep theirs."""

    def forward(self, x):
        w, chosen = self.router(x).softmax(-1).topk(1, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (chosen == e).squeeze(-1)
            if rows.any():
                y[rows] = w[rows] * expert(x[rows])
        return y


class OneKept(Chosen):
    """One expert a token by a maximum that keeps its axis; rows by `nonzero`; all are weighted at the end."""

    def forward(self, x):
        w, chosen = self.router(x).softmax(-1).max(dim=-1, keepdim=True)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (chosen == e).squeeze(-1).nonzero().squeeze(-1)
            if rows.numel():
                y[rows] = expert(x[rows])
        return y * w


class ZerosForIdle(Chosen):
    """In training an idle expert's parameters are added as zeros, so that they have a gradient."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            if mine.any():
                rows = mine.any(dim=-1).nonzero().flatten()
                y.index_add_(0, rows, expert(x[rows]) * w[mine].view(-1, 1))
            elif self.training:
                y[0, 0] += 0 * sum(p.sum() for p in expert.parameters())
        return y


class ListsOfRows(Chosen):
    """Rows of each expert in a list, their results in another one that is made of it; both are read to write them."""

    def forward(self, x):
        w, chosen = self.router(x).softmax(-1).max(dim=-1)
        rows = [torch.eq(chosen, e).nonzero(as_tuple=True)[0] for e in range(E)]
        y = x.new_zeros(x.shape)
        made = [self.experts[e](x[rows[e], :]) for e in range(E)]
        for e in range(E):
            y[rows[e], :] = made[e]
        return y * w.view(-1, 1)


class Apart(nn.Module):
    """Gate and up of an expert as two matrices on an axis of their own."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, 2, WIDTH, H) * 0.2)
        self.down = nn.Parameter(torch.randn(E, H, WIDTH) * 0.2)

    def choose(self, x):
        """Weights[T, k] and experts[T, k]."""
        w, chosen = self.router(x).softmax(-1).topk(K, dim=-1)
        return w / w.sum(-1, keepdim=True), chosen


class LoopApart(Apart):
    """Each of the two by its number, in a loop."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(chosen == e)
            both = self.up[e]
            h = F.silu(F.linear(x[token], both[0])) * F.linear(x[token], both[1])
            y.index_add_(0, token, F.linear(h, self.down[e]) * w[token, slot, None])
        return y


class TwoIndicesApart(Apart):
    """Expert and matrix in one index."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(chosen == e)
            rows = x[token]
            h = F.silu(rows @ self.up[e, 0].t()) * (rows @ self.up[e, 1].t())
            y.index_add_(0, token, (h @ self.down[e].t()) * w[token, slot, None])
        return y


class GatheredApart(Apart):
    """Both at once by an einsum of gathered matrices."""

    def forward(self, x):
        w, chosen = self.choose(x)
        h = torch.einsum("th,tkdfh->tkdf", x, self.up[chosen])
        h = F.silu(h[:, :, 0]) * h[:, :, 1]
        return torch.einsum("tkf,tkhf,tk->th", h, self.down[chosen], w)


class DenseApart(Apart):
    """Both at once, first of all axes, of every expert on every token."""

    def forward(self, x):
        w, chosen = self.choose(x)
        gates = torch.zeros(x.shape[0], E).scatter(1, chosen, w)
        a, b = torch.einsum("th,edfh->dtef", x, self.up).unbind(0)
        return torch.einsum("tef,ehf,te->th", F.silu(a) * b, self.down, gates)


SPELLINGS = (
    Spelling("BelowKth", "P6", BelowKth, tokens),
    Spelling("WhereBelowKth", "P6", WhereBelowKth, tokens),
    Spelling("SlotOfAll", "P1", SlotOfAll, batches),
    Spelling("WeightOfAll", "P1", WeightOfAll, tokens),
    Spelling("OneSlot", "P1", OneSlot, tokens),
    Spelling("OneSlotOfSequences", "P1", OneSlot, batches),
    Spelling("OneKept", "P1", OneKept, tokens),
    Spelling("ZerosForIdle", "P1", ZerosForIdle, tokens),
    Spelling("ListsOfRows", "P1", ListsOfRows, tokens),
    Spelling("LoopApart", "P3", LoopApart, tokens),
    Spelling("TwoIndicesApart", "P3", TwoIndicesApart, tokens),
    Spelling("GatheredApart", "P5", GatheredApart, tokens),
    Spelling("DenseApart", "P6", DenseApart, tokens),
)


class NotLowEnough(BelowKth):
    """Near miss: what is below the k-th still counts."""

    def gates(self, scores):
        kth = scores.topk(K, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < kth, -4.0).softmax(-1)


class Turned(BelowKth):
    """Near miss: the softmax is of the negative scores, so that those that were filled are the ones that count."""

    def gates(self, scores):
        kth = scores.topk(K, dim=-1).values[..., -1:]
        return (scores.masked_fill(scores < kth, -1e9) / -1.0).softmax(-1)


class SlotOfNext(Chosen):
    """Near miss: the slot is the one that chose the next expert, or the first where none did."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (chosen == e).any(dim=-1)
            weight = w.gather(-1, (chosen == (e + 1) % E).int().argmax(dim=-1, keepdim=True))
            y[rows] += weight[rows] * expert(x[rows])
        return y


class SlotOfTwice(Chosen):
    """Near miss: a token may choose an expert twice, and weighs it by the first of its slots."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen // 2 == e
            rows = mine.any(dim=-1)
            weight = w.gather(-1, mine.int().argmax(dim=-1, keepdim=True))
            y[rows] += weight[rows] * expert(x[rows])
        return y


class SlotBesideRows(Chosen):
    """Near miss: the weight at the slot is also added to tokens that did not choose the expert."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            weight = w.gather(-1, mine.int().argmax(dim=-1, keepdim=True))
            y = y + weight * expert(x)
        return y


class FirstOfTwoSlots(Chosen):
    """Near miss: of two slots the mask keeps the first, the weights are those of the second."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (chosen == e)[:, 0]
            y[rows] = w[rows, 1:] * expert(x[rows])
        return y


class LittleForIdle(Chosen):
    """Near miss: what idle experts add is little, but no zero."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            if mine.any():
                rows = mine.any(dim=-1).nonzero().flatten()
                y.index_add_(0, rows, expert(x[rows]) * w[mine].view(-1, 1))
            else:
                y[0, 0] += 0.1 * sum(p.sum() for p in expert.parameters())
        return y


class NextRows(Chosen):
    """Near miss: each expert's results are written to the next one's rows."""

    def forward(self, x):
        w, chosen = self.router(x).softmax(-1).max(dim=-1)
        chosen = chosen.new_tensor(range(x.shape[0])) % E
        rows = [torch.eq(chosen, e).nonzero(as_tuple=True)[0] for e in range(E)]
        y = x.new_zeros(x.shape)
        for e in range(E):
            y[rows[e - 1][:2], :] = self.experts[e](x[rows[e][:2], :])
        return y * w.view(-1, 1)


class TwiceTheFirst(Apart):
    """Near miss: both halves are the gate's, of the next expert."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(chosen == e)
            a, b = x[token] @ self.up[e, 0].t(), x[token] @ self.up[(e + 1) % E, 0].t()
            y.index_add_(0, token, F.linear(F.silu(a) * b, self.down[e]) * w[token, slot, None])
        return y


NEAR: tuple[type[nn.Module], ...] = (
    NotLowEnough,
    Turned,
    SlotOfNext,
    SlotOfTwice,
    SlotBesideRows,
    FirstOfTwoSlots,
    LittleForIdle,
    NextRows,
    TwiceTheFirst,
)
