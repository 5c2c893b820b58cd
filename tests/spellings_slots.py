"""Loops over a token's choices and over experts, one inside the other, and their near misses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import E, H, K, Spelling, batches, tokens
from spellings_strangers import Chosen
from torch import nn


class SlotsThenExperts(Chosen):
    """Choices outside, experts inside; masks are added to in place."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for i in range(K):
            ids, scale = chosen[:, i], w[:, i : i + 1]
            for e in range(E):
                mask = ids == e
                if mask.any():
                    y[mask] += scale[mask] * self.experts[e](x[mask])
        return y


class ExpertsThenSlots(Chosen):
    """Experts outside; an expert without rows is passed over before and inside the loop over choices."""

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, H)
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            for j in range(K):
                rows = torch.where(chosen[:, j] == e)[0]
                if rows.numel() == 0:
                    continue
                y.index_add_(0, rows, w[rows, j].unsqueeze(1) * expert(x[rows]))
        return y.view(shape)


class BothInOneBody(Chosen):
    """Stacked weights; the loop over choices stands in the middle of the body and stays there."""

    def __init__(self):
        super().__init__()
        del self.experts
        self.up = nn.Parameter(torch.randn(E, 24, H) * 0.2)
        self.down = nn.Parameter(torch.randn(E, H, 24) * 0.2)

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            up, down = self.up[e], self.down[e]
            for j in range(K):
                token = (chosen[:, j] == e).nonzero(as_tuple=True)[0]
                y[token] = y[token] + F.linear(F.relu(F.linear(x[token], up)), down) * w[token, j, None]
        return y


class OtherColumns(Chosen):
    """The weights of the slots in another order than the choices: exact, but not one router's columns."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for i in range(K):
            for e in range(E):
                mask = chosen[:, i] == e
                y[mask] += w[mask, K - 1 - i, None] * self.experts[e](x[mask])
        return y


class SlotsOfTheirOwn(Chosen):
    """Each slot has experts of its own: two layers."""

    def __init__(self):
        super().__init__()
        self.others = nn.ModuleList(self.expert() for _ in range(E))

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for i, experts in enumerate((self.experts, self.others)):
            for e in range(E):
                mask = chosen[:, i] == e
                y[mask] += w[mask, i, None] * experts[e](x[mask])
        return y


class LaterSlotsWin(Chosen):
    """Rows are written, not added."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            for i in range(K):
                mask = chosen[:, i] == e
                y[mask] = w[mask, i, None] * expert(x[mask])
        return y


class ReadsWhatItWrites(Chosen):
    """Each slot's experts read the sum so far."""

    def forward(self, x):
        w, chosen = self.choose(x)
        for i in range(K):
            y = x.clone()
            for e in range(E):
                mask = chosen[:, i] == e
                y[mask] += w[mask, i, None] * self.experts[e](x[mask])
            x = y
        return x


class PassedOverByOthers(Chosen):
    """An expert that nobody has as the first choice is passed over for all."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            first = chosen[:, 0] == e
            if not first.any():
                continue
            for i in range(K):
                mask = chosen[:, i] == e
                y[mask] += w[mask, i, None] * expert(x[mask])
        return y


class Normed(nn.Sequential):
    """An expert that is no MLP."""

    def __init__(self):
        super().__init__(nn.Linear(H, 24), nn.LayerNorm(24), nn.Linear(24, H))


class SlotsOfNormed(SlotsThenExperts):
    """Two loops in a row add to one sum, and keep their experts' code."""

    expert = Normed


class SlotsBesideTheInput(SlotsThenExperts):
    """What the slots add stands in one sum with the layer's input, as behind a residual connection."""

    def forward(self, x):
        return x + super().forward(x)


class SlotsBehindTheInput(Chosen):
    """The sum over slots begins with something else than zeros."""

    def forward(self, x):
        w, chosen = self.choose(x)
        up = torch.stack([e.up.weight for e in self.experts])
        down = torch.stack([e.down.weight for e in self.experts])
        y = x * 0.5
        for i in range(K):
            h = F.relu(torch.einsum("th,tfh->tf", x, up[chosen[:, i]]))
            y = y + w[:, i, None] * torch.einsum("tf,thf->th", h, down[chosen[:, i]])
        return y


SPELLINGS = (
    Spelling("SlotsBesideTheInput", "P1", SlotsBesideTheInput, tokens),
    Spelling("SlotsBehindTheInput", "P5", SlotsBehindTheInput, tokens),
    Spelling("SlotsThenExperts", "P1", SlotsThenExperts, tokens),
    Spelling("ExpertsThenSlots", "P1", ExpertsThenSlots, batches),
    Spelling("BothInOneBody", "P3", BothInOneBody, tokens),
    Spelling("OtherColumns", "P1", OtherColumns, tokens),
)

NEAR = (SlotsOfTheirOwn, LaterSlotsWin, ReadsWhatItWrites, PassedOverByOthers, SlotsOfNormed)
"""What must compute what it did; several sites, or none."""
