"""Layers as people adapt published ones: a line more here, another word for the same there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K, Spelling, batches, tokens
from spellings_strangers import Chosen
from torch import nn


class ZerosForIdleExperts(Chosen):
    """Both sides of the question whether there are rows write them; one adds zeros that reach every parameter."""

    def forward(self, x):
        w, chosen = self.choose(x)
        flat = chosen.view(-1)
        rows = x.repeat_interleave(K, dim=0)
        y = torch.empty_like(rows)
        for e, expert in enumerate(self.experts):
            out = expert(rows[flat == e])
            if out.shape[0] > 0:
                y[flat == e] = out.to(y.dtype)
            else:
                y[flat == e] = out.to(y.dtype) + 0 * sum(p.sum() for p in expert.parameters())
        return (y.view(*w.shape, -1) * w.unsqueeze(-1)).sum(dim=1)


class GatesFromLeaf(Chosen):
    """Gates are scattered into zeros that ask for a gradient, in one expression."""

    def forward(self, x):
        w, chosen = self.choose(x)
        gates = torch.zeros(x.shape[0], E, requires_grad=True).scatter(1, chosen, w)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = gates[:, e].nonzero().squeeze(-1)
            y.index_add_(0, rows, expert(x[rows]) * gates[rows, e].unsqueeze(-1))
        return y


class CopiedRows(Chosen):
    """A table says each token's expert; rows are copied to their places."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randint(0, E, (50,)))

    def forward(self, x):
        chosen = self.table[(x[..., 0] * 7).long().remainder(50)].view(-1)
        rows, y = x.view(-1, H), torch.zeros(x.shape[:-1].numel(), H)
        for e, expert in enumerate(self.experts):
            mine = (chosen == e).nonzero(as_tuple=False).flatten()
            if mine.numel():
                y.index_copy_(0, mine, expert(rows.index_select(0, mine)))
        return y.view_as(x)


class Narrow(nn.Module):
    """An expert on a row that is narrower than the model's."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H // 2, WIDTH), nn.Linear(WIDTH, H // 2, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


class LatentRows(Chosen):
    """All experts on all tokens, which were made narrower before by a layer of their own."""

    expert = Narrow

    def __init__(self):
        super().__init__()
        self.narrow, self.widen = nn.Linear(H, H // 2), nn.Linear(H // 2, H, bias=False)

    def latent(self, x, e):
        """The row that expert e reads."""
        return x

    def forward(self, x):
        scores = self.router(x).sigmoid()
        w, chosen = scores.topk(K, dim=-1)
        rows = self.narrow(x)
        out = torch.stack([expert(self.latent(rows, e)) for e, expert in enumerate(self.experts)], dim=1)
        gates = torch.zeros_like(scores).scatter(-1, chosen, w)
        return self.widen(torch.einsum("te,ted->td", gates, out))


SPELLINGS = (
    Spelling("ZerosForIdleExperts", "P1", ZerosForIdleExperts, tokens),
    Spelling("GatesFromLeaf", "P2", GatesFromLeaf, tokens),
    Spelling("CopiedRows", "P1", CopiedRows, batches),
    Spelling("LatentRows", "P6", LatentRows, tokens),
)


class OnesForIdleExperts(Chosen):
    """Near miss: the sides differ in more than zeros."""

    def forward(self, x):
        w, chosen = F.softmax(self.router(x), dim=-1).max(-1)
        y = torch.zeros(x.shape[0] + 1, H)
        for e, expert in enumerate(self.experts):
            rows = torch.where(chosen == e)[0]
            if rows.numel() > 3:
                y[rows] = expert(x[rows]) * w[rows].unsqueeze(-1)
            else:
                y[rows] = expert(x[rows]) + 1 * sum(p.sum() for p in expert.parameters())
        return y


class LastCopyWins(Chosen):
    """Near miss: two experts a token, and the row that is copied last stays."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            y.index_copy_(0, token, w[token, slot, None] * expert(x[token]))
        return y


class LatentOfTheirOwn(LatentRows):
    """Near miss: one expert reads other rows than the rest."""

    def latent(self, x, e):
        return x.flip(0) if e == 1 else x


NEAR = (OnesForIdleExperts, LastCopyWins, LatentOfTheirOwn)
