"""Rows that are a token each, not a pair: their weight among the token's slots; and columns of gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K, Spelling, batches, tokens
from spellings_strangers import Chosen
from torch import nn


class ByToken(Chosen):
    """A loop over experts that asks which tokens chose each; `weigh` gives their rows' weights [n, 1]."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (chosen == e).any(-1)
            if mine.any():
                y[mine] += expert(x[mine]) * self.weigh(w, chosen, mine, e)
        return y


class WhereOfAll(ByToken):
    """The weights of all tokens, 0 where another expert was chosen."""

    def weigh(self, w, chosen, mine, e):
        return torch.where(chosen == e, w, torch.zeros_like(w)).sum(-1)[mine].unsqueeze(-1)


class WhereInRows(ByToken):
    """The same of the expert's rows alone."""

    def weigh(self, w, chosen, mine, e):
        return torch.where(chosen[mine] == e, w[mine], 0.0).sum(-1, keepdim=True)


class PlacesInRows(ByToken):
    """The slot is where the rows' mask is true."""

    def weigh(self, w, chosen, mine, e):
        rows = w[mine]
        slot = (chosen[mine] == e).nonzero(as_tuple=True)[1]
        return rows[torch.arange(rows.shape[0]), slot].unsqueeze(-1)


class MaskAndSlot(ByToken):
    """A mask of tokens beside the slots."""

    def weigh(self, w, chosen, mine, e):
        return w[mine, (chosen[mine] == e).nonzero(as_tuple=True)[1]].unsqueeze(-1)


class MaskOfRows(ByToken):
    """The rows' mask picks one weight a row."""

    def weigh(self, w, chosen, mine, e):
        return w[mine][chosen[mine] == e].unsqueeze(1)


class LargestOfMask(ByToken):
    """The slot is the largest of a mask of numbers."""

    def weigh(self, w, chosen, mine, e):
        return w[mine].gather(1, (chosen[mine] == e).float().argmax(dim=1, keepdim=True))


class GatesOf(Chosen):
    """Gates of all experts, zero but at the chosen."""

    def gates(self, x):
        w, chosen = self.choose(x)
        return torch.zeros(*x.shape[:-1], E).scatter(-1, chosen, w)


class ColumnOfRows(GatesOf):
    """Where a column is positive; the column of the rows' gates."""

    def forward(self, x):
        gates, y = self.gates(x), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = gates[..., e] > 0
            if mine.any():
                y[mine] += gates[mine][:, e : e + 1] * expert(x[mine])
        return y


class PlacesOfColumn(GatesOf):
    """The places where a column is not zero."""

    def forward(self, x):
        gates, y = self.gates(x), torch.zeros_like(x)
        for e in range(E):
            rows = torch.nonzero(gates[:, e]).squeeze(1)
            y[rows] += self.experts[e](x[rows]) * gates[rows, e : e + 1]
        return y


class SlotsOfSequences(Chosen):
    """A loop over slots, tokens on two axes: one dispatch."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for s in range(K):
            picked, weight = chosen[:, :, s], w[:, :, s : s + 1]
            for e in range(E):
                mine = picked == e
                if mine.any():
                    y[mine] += weight[mine] * self.experts[e](x[mine])
        return y


class WrittenPairs(Chosen):
    """Each pair's row is written to its place, then weighted."""

    def forward(self, x):
        w, chosen = self.choose(x)
        rows = torch.zeros(x.shape[0], K, H)
        for e in range(E):
            token, slot = torch.where(chosen == e)
            rows[token, slot] = self.experts[e](x[token])
        return (rows * w.unsqueeze(-1)).sum(1)


class ColumnsOfSlots(Chosen):
    """Every expert on every token, masked for each slot."""

    last = E

    def forward(self, x):
        w, chosen = self.choose(x)
        outs = [expert(x) for expert in self.experts]
        y = torch.zeros_like(x)
        for s in range(K):
            for e in range(E if s == 0 else self.last):
                mine = (chosen[:, s] == e).float().unsqueeze(-1)
                y = y + w[:, s : s + 1] * mine * outs[e]
        return y


class Dense(Chosen):
    """Every expert on every token; `gates` are zero but at the chosen."""

    def forward(self, x):
        outs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return (self.gates(self.router(x)).unsqueeze(-1) * outs).sum(-2)


class Normalized(Dense):
    """Masked scores over their sum, by `F.normalize`."""

    def gates(self, logits):
        p = logits.softmax(-1)
        return F.normalize(p * torch.zeros_like(p).scatter(-1, p.topk(K, -1).indices, 1.0), p=1, dim=-1)


def best_of(logits: torch.Tensor, low: float) -> torch.Tensor:
    """The softmax of a token's K best scores, the others being `low`."""
    best, chosen = logits.topk(K, -1)
    return torch.full_like(logits, low).scatter(-1, chosen, best).softmax(-1)


class Sunk(Dense):
    """Scores of the others are so low that a softmax gives 0."""

    def gates(self, logits):
        return best_of(logits, -1e9)


class KthScore(Dense):
    """Scores from the K-th on."""

    def gates(self, logits):
        p = logits.softmax(-1)
        kept = torch.where(p >= p.topk(K, -1).values[..., -1:], p, torch.zeros_like(p))
        return kept / kept.sum(-1, keepdim=True)


class Pixels(Dense):
    """Images [B, H, …] whose channels are made the last axis."""

    def gates(self, logits):
        return best_of(logits, float("-inf"))

    def forward(self, x):
        seen = x.flatten(2).transpose(1, 2)
        return super().forward(seen).transpose(1, 2).reshape(x.shape)


class CopiedStart(Chosen):
    """Each token's one row is written over a copy of the tokens."""

    experts_chosen = E

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, self.experts_chosen)

    def forward(self, x):
        best, chosen = self.router(x).softmax(-1).max(-1)
        y = x.clone()
        for e in range(E):
            mine = chosen == e
            y[mine] = self.experts[e](x[mine])
        return best.unsqueeze(-1) * y


class Counted(Chosen):
    """The loop also writes down how often each expert was chosen: the experts leave it, that stays a loop."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y, used = torch.zeros_like(x), torch.zeros(E)
        for e in range(E):
            mine = chosen == e
            used[e] = mine.float().mean()
            rows = mine.any(-1)
            if rows.any():
                y[rows] += self.experts[e](x[rows]) * (w * mine).sum(-1)[rows].unsqueeze(-1)
        return y + used.sum()


def images(count: int) -> tuple[torch.Tensor, ...]:
    """x[2, H, T, 3]."""
    return (torch.randn(2, H, count, 3, generator=torch.Generator().manual_seed(count)),)


SPELLINGS: tuple[Spelling, ...] = (
    Spelling("where-of-all", "P1", WhereOfAll, tokens),
    Spelling("where-in-rows", "P1", WhereInRows, batches),
    Spelling("places-in-rows", "P1", PlacesInRows, tokens),
    Spelling("mask-and-slot", "P1", MaskAndSlot, batches),
    Spelling("mask-of-rows", "P1", MaskOfRows, batches),
    Spelling("largest-of-mask", "P1", LargestOfMask, tokens),
    Spelling("column-of-rows", "P1", ColumnOfRows, batches),
    Spelling("places-of-column", "P1", PlacesOfColumn, tokens),
    Spelling("slots-of-sequences", "P1", SlotsOfSequences, batches),
    Spelling("written-pairs", "P1", WrittenPairs, tokens),
    Spelling("columns-of-slots", "P9", ColumnsOfSlots, tokens),
    Spelling("normalized", "P6", Normalized, batches),
    Spelling("sunk", "P6", Sunk, tokens),
    Spelling("kth-score", "P6", KthScore, tokens),
    Spelling("pixels", "P6", Pixels, images),
    Spelling("copied-start", "P1", CopiedStart, batches),
    Spelling("counted", "P1", Counted, tokens),
)

TRAINED = ("where-in-rows", "column-of-rows", "columns-of-slots", "kth-score", "counted")
"""Those whose gradients are tried too."""


class FilledWithOne(ByToken):
    """Near miss: slots of other experts count 1 each."""

    def weigh(self, w, chosen, mine, e):
        return torch.where(chosen[mine] == e, w[mine], 1.0).sum(-1, keepdim=True)


class OtherExpert(ByToken):
    """Near miss: the weights are those of the next expert."""

    def weigh(self, w, chosen, mine, e):
        return torch.where(chosen[mine] == e + 1, w[mine], 0.0).sum(-1, keepdim=True)


class FirstOfTwice(ByToken):
    """Near miss: a token may choose an expert twice, and the first of its slots is its weight."""

    def choose(self, x):
        w, chosen = super().choose(x)
        return w, chosen // 2

    def weigh(self, w, chosen, mine, e):
        return w[mine].gather(1, (chosen[mine] == e).float().argmax(dim=1, keepdim=True))


class ColumnMissing(ColumnsOfSlots):
    """Near miss: the last expert is never a second choice."""

    last = E - 1


class NotSunk(Dense):
    """Near miss: the others' scores still count."""

    def gates(self, logits):
        return best_of(logits, -3.0)


class CopyKept(CopiedStart):
    """Tokens may choose an expert that the loop does not run, and keep what they are."""

    experts_chosen = E + 1


NEAR = (FilledWithOne, OtherExpert, FirstOfTwice, ColumnMissing, NotSunk)


class Narrow(Chosen):
    """Experts that are not as wide behind as before: no kernel's, their code runs on sorted rows."""

    @staticmethod
    def expert():
        return nn.Sequential(nn.Linear(H, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 5))

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros(*x.shape[:-1], 5)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


class NormedSequences(Chosen):
    """Experts with a norm, of tokens on two axes that have one expert each."""

    @staticmethod
    def expert():
        return nn.Sequential(nn.LayerNorm(H), nn.Linear(H, H))

    def forward(self, x):
        best, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            if mine.any():
                y[mine] = expert(x[mine])
        return y * best.unsqueeze(-1)


class NormedPairs(NormedSequences):
    """The same, with several experts a token."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            b, s, slot = torch.where(chosen == e)
            y[b, s] += expert(x[b, s]) * w[b, s, slot].unsqueeze(-1)
        return y


OWN_CODE: tuple[Spelling, ...] = (
    Spelling("narrow", "P13", Narrow, tokens),
    Spelling("normed-sequences", "P13", NormedSequences, batches),
    Spelling("normed-pairs", "P13", NormedPairs, batches),
)
