"""Rows of each expert kept in lists, with what says whose they are, and joined behind the loop; ends searched for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K, Spelling, tokens
from spellings_strangers import Chosen
from torch import nn


class Placed(Chosen):
    """One expert a token: rows and their places."""

    def forward(self, x):
        w, chosen = self.router(x).softmax(-1).max(-1)
        rows, places = [], []
        for e in range(E):
            at = (chosen == e).nonzero(as_tuple=True)[0]
            rows.append(self.experts[e](x[at]))
            places.append(at)
        y = torch.zeros_like(x)
        y[torch.cat(places)] = torch.cat(rows)
        return y * w[:, None]


class Added(Chosen):
    """Rows, tokens and weights, whose names become those of what is joined."""

    def forward(self, x):
        w, chosen = self.choose(x)
        rows, places, weights = [], [], []
        for e, expert in enumerate(self.experts):
            t, s = torch.where(chosen == e)
            rows.append(expert(x[t]))
            places.append(t)
            weights.append(w[t, s])
        rows = torch.cat(rows, 0)
        places = torch.cat(places)
        weights = torch.cat(weights)
        return torch.zeros_like(x).index_add_(0, places, rows * weights[:, None])


class PassedBy(Chosen):
    """Idle experts add to no list."""

    def forward(self, x):
        w, chosen = self.choose(x)
        rows, places = [], []
        for e, expert in enumerate(self.experts):
            t, s = torch.where(chosen == e)
            if t.numel() == 0:
                continue
            rows.append(expert(x[t]) * w[t, s].unsqueeze(-1))
            places.append(t)
        y = torch.zeros_like(x)
        if len(rows) > 0:
            y.index_add_(0, torch.cat(places), torch.cat(rows))
        return y


class EndsFound(Chosen):
    """Sorted rows cut where a search among the sorted choices says."""

    def forward(self, x):
        w, chosen = self.choose(x)
        ids, order = chosen.reshape(-1).sort(stable=True)
        rows = x[order // K]
        done = torch.empty_like(rows)
        start = 0
        for e, end in enumerate(torch.searchsorted(ids, torch.arange(E), right=True).tolist()):
            done[start:end] = self.experts[e](rows[start:end])
            start = end
        return torch.zeros_like(x).index_add(0, order // K, done * w.reshape(-1)[order, None])


class BothFound(Chosen):
    """Starts and ends of the runs."""

    def forward(self, x):
        w, chosen = self.choose(x)
        ids, order = chosen.reshape(-1).sort()
        places = torch.arange(E)
        starts, ends = torch.searchsorted(ids, places), torch.searchsorted(ids, places, side="right")
        y = torch.zeros_like(x)
        for e in range(E):
            at = order[starts[e] : ends[e]]
            y.index_add_(0, at // K, self.experts[e](x[at // K]) * w.reshape(-1)[at, None])
        return y


class SlotAfterSlot(Chosen):
    """Every expert on every token; each slot takes its own, and a sum in Python begins with 0."""

    def forward(self, x):
        w, chosen = self.choose(x)
        rows, tokens_ = torch.stack([expert(x) for expert in self.experts]), torch.arange(x.shape[0])
        return sum(rows[chosen[:, s], tokens_] * w[:, s : s + 1] for s in range(K))


class HandedOn(Chosen):
    """Counts on the host, handed to a method that cuts rows by them, once for each of two layers."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, WIDTH, H) * 0.2)
        self.down = nn.Parameter(torch.randn(E, H, WIDTH) * 0.2)

    def layer(self, x, weights, sizes):
        parts = x.split(sizes, dim=0)
        return torch.cat([F.linear(parts[e], weights[e]) for e in range(E)], dim=0)

    def forward(self, x):
        w, chosen = self.choose(x)
        sizes = torch.zeros(x.shape[0], E).scatter(1, chosen, 1).long().sum(0).tolist()
        order = chosen.flatten().sort(0)[1]
        rows = F.gelu(self.layer(x[order // K], self.up, sizes))
        rows = self.layer(rows, self.down, sizes) * w.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // K, rows)


def _named(kind: type[nn.Module]) -> Spelling:
    return Spelling(kind.__name__, "P7", kind, tokens)


SPELLINGS = tuple(map(_named, (Placed, Added, PassedBy, EndsFound, BothFound, SlotAfterSlot, HandedOn)))


class LastWins(Chosen):
    """Two experts a token, written over each other."""

    def forward(self, x):
        _, chosen = self.choose(x)
        rows, places = [], []
        for e, expert in enumerate(self.experts):
            t, _ = torch.where(chosen == e)
            rows.append(expert(x[t]))
            places.append(t)
        y = torch.zeros_like(x)
        y[torch.cat(places)] = torch.cat(rows)
        return y


class OtherPlaces(Chosen):
    """Rows of one choice, places of another."""

    def forward(self, x):
        w, chosen = self.router(x).softmax(-1).max(-1)
        other = self.router(x).argmin(-1)
        rows, places = [], []
        for e, expert in enumerate(self.experts):
            rows.append(expert(x[torch.where(chosen == e)[0]]))
            places.append(torch.where(other == e)[0])
        y = torch.zeros_like(x)
        y.index_add_(0, torch.cat(places), torch.cat(rows))
        return y * w[:, None]


class OtherTokens(Chosen):
    """Each token takes what the experts made of another."""

    def forward(self, x):
        w, chosen = self.choose(x)
        rows, tokens_ = torch.stack([expert(x) for expert in self.experts]), torch.arange(x.shape[0]).flip(0)
        return sum(rows[chosen[:, s], tokens_] * w[:, s : s + 1] for s in range(K))


class Backwards(Chosen):
    """Places are put in front of those before them, rows behind."""

    def forward(self, x):
        w, chosen = self.router(x).softmax(-1).max(-1)
        rows, places = [], []
        for e, expert in enumerate(self.experts):
            at = torch.where(chosen == e)[0]
            rows.append(expert(x[at]))
            places.insert(0, at)
        y = torch.zeros_like(x)
        y[torch.cat(places)] = torch.cat(rows)
        return y * w[:, None]


class OtherRuns(Chosen):
    """Ends are searched for among the next ids."""

    def forward(self, x):
        w, chosen = self.choose(x)
        ids, order = chosen.reshape(-1).sort(stable=True)
        rows = x[order // K]
        done = torch.zeros_like(rows)
        start = 0
        for e, end in enumerate(torch.searchsorted(ids, torch.arange(E) + 1, right=True).tolist()):
            done[start:end] = self.experts[e](rows[start:end])
            start = end
        return torch.zeros_like(x).index_add(0, order // K, done * w.reshape(-1)[order, None])


NEAR = (LastWins, OtherPlaces, OtherTokens, Backwards, OtherRuns)
