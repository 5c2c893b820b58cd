"""Ways to write MoE layers that keep their tokens on several axes: x[B, S, H], choices [B, S, k], masks [B, S]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import E, H, K, Mlp, Spelling, batches
from spellings_strangers import Chosen
from torch import nn


class SparseGates(Chosen):
    """Scores of the chosen scattered into −∞, then softmax: a gate for each expert; a mask seen flat and as it is."""

    def forward(self, x):
        top, indices = self.router(x).topk(K, dim=-1)
        zeros = torch.full_like(self.router(x), float("-inf"))
        gating = F.softmax(zeros.scatter(-1, indices, top), dim=-1)
        final = torch.zeros_like(x)
        flat_x, flat_gates = x.view(-1, x.size(-1)), gating.view(-1, gating.size(-1))
        for i, expert in enumerate(self.experts):
            mask = (indices == i).any(dim=-1)
            flat_mask = mask.view(-1)
            if flat_mask.any():
                out = expert(flat_x[flat_mask])
                weighted = out * flat_gates[flat_mask, i].unsqueeze(1)
                final[mask] += weighted.squeeze(1)
        return final


class GatesAtMask(SparseGates):
    """The same with gates read at the mask as it is, and rows too."""

    def forward(self, x):
        logits = self.router(x)
        top, indices = logits.topk(K, dim=-1)
        gating = torch.softmax(torch.full_like(logits, float("-inf")).scatter(-1, indices, top), dim=-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = (indices == i).any(dim=-1)
            out[mask] = out[mask] + expert(x[mask]) * gating[mask, i].unsqueeze(1)
        return out


class TwoIndices(Chosen):
    """torch.where of a mask of slots gives three indices; rows are read and added by the first two."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            b, s, slot = torch.where(chosen == e)
            y[b, s] += w[b, s, slot, None] * expert(x[b, s])
        return y


class MaskedWeights(Chosen):
    """Weights times a mask of slots, summed over them, read where any of them is set."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            b, s = torch.where(mine.any(-1))
            if b.numel() == 0:
                continue
            weight = (w * mine).sum(dim=-1)
            y[b, s] = y[b, s] + expert(x[b, s]) * weight[b, s].unsqueeze(-1)
        return y


class OneOnTwoAxes(Chosen):
    """One expert a token: its choice has the tokens' axes alone."""

    def forward(self, x):
        probabilities = self.router(x).softmax(-1)
        chosen = probabilities.argmax(-1)
        w = probabilities.max(-1).values
        y = torch.empty_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            y[mine] = expert(x[mine]) * w[mine].unsqueeze(-1)
        return y


class FlatColumns(Chosen):
    """Flat tokens from the start; one column of gates, put in the choice's place by its transpose."""

    def forward(self, x):
        flat = x.reshape(-1, H)
        top, chosen = self.router(flat).topk(K, dim=-1)
        gates = torch.zeros(flat.shape[0], E).scatter(1, chosen, top.softmax(-1))
        columns = gates.t()
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token = torch.where((chosen == e).any(1))[0]
            y.index_add_(0, token, expert(flat[token]) * columns[e][token, None])
        return y.view_as(x)


class BeforeRouting(Chosen):
    """The choice is made on flat logits and seen on three axes; the sum starts from the tokens themselves."""

    def forward(self, x):
        batch, length, _ = x.shape
        w, chosen = self.choose(x.reshape(-1, H))
        chosen, w = chosen.view(batch, length, K), w.view(batch, length, K)
        y = x.clone()
        for e, expert in enumerate(self.experts):
            b, s, slot = (chosen == e).nonzero(as_tuple=True)
            y.index_put_((b, s), expert(x[b, s]) * w[b, s, slot].unsqueeze(-1), accumulate=True)
        return y


SPELLINGS = (
    Spelling("SparseGates", "P1", SparseGates, batches),
    Spelling("GatesAtMask", "P1", GatesAtMask, batches),
    Spelling("TwoIndices", "P1", TwoIndices, batches),
    Spelling("MaskedWeights", "P2", MaskedWeights, batches),
    Spelling("OneOnTwoAxes", "P1", OneOnTwoAxes, batches),
    Spelling("FlatColumns", "P1", FlatColumns, batches),
    Spelling("BeforeRouting", "P1", BeforeRouting, batches),
)


class Drawn(nn.Module):
    """Tokens that may draw an expert twice."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(E))
        self.register_buffer("table", torch.tensor([[1, 1], [0, 2], [3, 3], [2, 1]]))

    def choose(self, x):
        """Gates of all experts, and two drawn experts a token."""
        gates = self.router(x).softmax(-1)
        return gates, self.table[gates.argmax(-1)]


class TwiceOneRow(Drawn):
    """Near miss: an expert drawn twice by a token runs once on it."""

    def forward(self, x):
        gates, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (chosen == e).any(dim=-1)
            y[mask] += expert(x[mask]) * gates[mask, e].unsqueeze(1)
        return y


class TwiceUnweighted(Drawn):
    """Near miss: the same without weights."""

    def forward(self, x):
        _, chosen = self.choose(x.reshape(-1, H))
        flat = x.reshape(-1, H)
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token = torch.where((chosen == e).any(dim=-1))[0]
            y.index_add_(0, token, expert(flat[token]))
        return y.view_as(x)


class OtherPlaces(Chosen):
    """Near miss: rows are read from one token and added to another, whose axes are swapped."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x.transpose(0, 1))
        for e, expert in enumerate(self.experts):
            b, s, slot = torch.where(chosen == e)
            y[s, b] += w[b, s, slot, None] * expert(x[b, s])
        return y


class NextColumn(Chosen):
    """Near miss: the gates of the next expert."""

    def forward(self, x):
        logits = self.router(x)
        top, indices = logits.topk(K, dim=-1)
        gating = torch.softmax(torch.full_like(logits, -1e4).scatter(-1, indices, top), dim=-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = (indices == i).any(dim=-1)
            y[mask] += expert(x[mask]) * gating[mask, (i + 1) % E].unsqueeze(1)
        return y


class OtherMask(Chosen):
    """Near miss: rows of one mask are added where another one is set, of as many tokens."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (chosen == e).any(dim=-1)
            weight = (w * (chosen == e)).sum(-1)
            y[mask.flip(0)] += expert(x[mask]) * weight[mask].unsqueeze(-1)
        return y


NEAR = (TwiceOneRow, TwiceUnweighted, OtherPlaces, NextColumn, OtherMask)
