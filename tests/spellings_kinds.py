"""Experts of several kinds in one list: identities, zeros and constants beside MLPs, in loops that add."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, H, Mlp, Spelling, tokens
from torch import nn


class Copied(nn.Module):
    """Hands on what it is given."""

    def forward(self, x):
        return x


class Zeros(nn.Module):
    """Gives nothing."""

    def forward(self, x):
        return torch.zeros_like(x).to(x.dtype)


class Constant(nn.Module):
    """Its row and a vector of its own, mixed by a small softmax."""

    def __init__(self):
        super().__init__()
        self.constant, self.mix = nn.Parameter(torch.randn(H)), nn.Linear(H, 2, bias=False)

    def forward(self, x):
        w = self.mix(x).softmax(-1)
        return w[:, :1] * x + w[:, 1:] * self.constant


class Wide(nn.Module):
    """Another MLP."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(H, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, H))

    def forward(self, x):
        return self.net(x)


class Mixed(nn.Module):
    """Every expert of a list in turn; idle ones are passed over."""

    kinds = (Mlp, Mlp, Mlp, nn.Identity)

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, len(self.kinds), bias=False)
        self.experts = nn.ModuleList(kind() for kind in self.kinds)

    def choose(self, x):
        """w[T, 2] and the chosen[T, 2]."""
        w, chosen = F.softmax(self.router(x), dim=-1).topk(2, dim=-1)
        return w / w.sum(-1, keepdim=True), chosen

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            if token.numel() == 0:
                continue
            y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


class IdentitiesFirst(Mixed):
    """The MLPs come last."""

    kinds = (Copied, Copied, Mlp, Mlp, Mlp)


class ByHits(Mixed):
    """Only the experts that are hit; two identities."""

    kinds = (Mlp, Mlp, nn.Identity, nn.Identity)

    def forward(self, x):
        w, chosen = self.choose(x)
        mask = F.one_hot(chosen, len(self.kinds)).permute(2, 1, 0)
        y = torch.zeros_like(x)
        for e in mask.sum(dim=(1, 2)).nonzero().squeeze(1):
            slot, token = torch.where(mask[e])
            y.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return y


class ByNumber(Mixed):
    """The list is looked up; masks of tokens; the zeros are added like all others."""

    kinds = (Mlp, Mlp, Mlp, Zeros)

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(len(self.experts)):
            hit = chosen == e
            mine = hit.any(-1)
            if mine.any():
                y[mine] += (w * hit).sum(-1)[mine].unsqueeze(-1) * self.experts[e](x[mine])
        return y


class FourKinds(Mixed):
    """MLPs, constants, an identity and zeros."""

    kinds = (Mlp, Mlp, Mlp, Constant, Constant, Copied, Zeros)


class TwoMlps(Mixed):
    """MLPs of two widths."""

    kinds = (Mlp, Mlp, Wide, Wide)


KINDS = (Mixed, IdentitiesFirst, ByHits, ByNumber, FourKinds)
SPELLINGS = tuple(Spelling(kind.__name__, "P1", kind, tokens) for kind in KINDS)


class Written(Mixed):
    """Left: rows are written, so the order of experts counts."""

    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = torch.where(chosen == e)[0]
            y[rows] = expert(x[rows])
        return y


class Turned(Mixed):
    """Near miss: another expert than the loop's own is looked up."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(len(self.experts)):
            token, slot = torch.where(chosen == e)
            y.index_add_(0, token, self.experts[len(self.experts) - 1 - e](x[token]) * w[token, slot, None])
        return y


class AllUnlike(Mixed):
    """Near miss: no two experts are alike."""

    kinds = (Mlp, Wide, Constant, Copied)


NEAR = (Written, Turned, AllUnlike)
