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


class AskedNumber(Chosen):
    """How many rows an expert has is moved to the host, and only asked about."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            count = mine.sum().item()
            if count == 0:
                continue
            rows = mine.any(dim=-1)
            y[rows] += expert(x[rows]) * w[mine].unsqueeze(-1)
        return y


class MapsSplitByCounts(Chosen):
    """Who goes where is a map [E, T]; what is selected by it is split by its counts, and weighted when it is joined."""

    def forward(self, x):
        w, chosen = self.choose(x)
        gates = torch.zeros(x.shape[0], E).scatter(1, chosen, w)
        goes = torch.zeros(x.shape[0], E).int().scatter(1, chosen, 1).bool()
        places = torch.arange(x.shape[0]).unsqueeze(0).expand(E, -1).masked_select(goes.T.contiguous())
        rows = x.index_select(0, places)
        outs = []
        for part, expert in zip(torch.split(rows, goes.sum(0).tolist()), self.experts, strict=True):
            outs.append(expert(part))
        out = torch.cat(outs, 0)
        out = out * gates.T.contiguous().masked_select(goes.T.contiguous()).unsqueeze(-1)
        return torch.zeros(x.shape[0], H).scatter_add_(0, places.unsqueeze(1).expand(-1, H), out)


class PlacesAsked(Chosen):
    """Each turn asks the sorted ids where its expert's rows begin and where the next one's do."""

    beyond = 1

    def forward(self, x):
        w, chosen = self.choose(x)
        ids, order = chosen.reshape(-1).sort()
        token, weights = order // K, w.reshape(-1)[order]
        y = torch.zeros_like(x)
        for e in range(E):
            start, end = torch.searchsorted(ids, e), torch.searchsorted(ids, e + self.beyond)
            if start == end:
                continue
            mine = token[start:end]
            y.index_add_(0, mine, self.experts[e](x[mine]) * weights[start:end].unsqueeze(-1))
        return y


class PlacesCutInline(Chosen):
    """Starts of all experts' rows on the host; rows are cut where they are added."""

    def forward(self, x):
        w, chosen = self.choose(x)
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        token, weights = torch.div(order, K, rounding_mode="floor"), w.reshape(-1)[order]
        rows = x.index_select(0, token)
        places = torch.searchsorted(flat[order].contiguous(), torch.arange(E + 1)).tolist()
        y = torch.zeros_like(x)
        for e in range(E):
            start, end = places[e], places[e + 1]
            if start == end:
                continue
            y.index_add_(0, token[start:end], self.experts[e](rows[start:end]) * weights[start:end].unsqueeze(1))
        return y


SPELLINGS = (
    Spelling("PlacesAsked", "P7", PlacesAsked, tokens),
    Spelling("PlacesCutInline", "P7", PlacesCutInline, tokens),
    Spelling("AskedNumber", "P2", AskedNumber, tokens),
    Spelling("MapsSplitByCounts", "P7", MapsSplitByCounts, tokens),
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


class AskedAndUsed(Chosen):
    """Near miss: the number of rows that was moved to the host is a factor too."""

    def forward(self, x):
        _, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (chosen == e).any(dim=-1)
            count = mine.sum().item()
            if count == 0:
                continue
            y[mine] += expert(x[mine]) / count
        return y


class PlacesOfTwo(PlacesAsked):
    """Near miss: rows are cut where those of the next expert but one begin."""

    beyond = 2


class LatentOfTheirOwn(LatentRows):
    """Near miss: one expert reads other rows than the rest."""

    def latent(self, x, e):
        return x.flip(0) if e == 1 else x


NEAR = (OnesForIdleExperts, LastCopyWins, LatentOfTheirOwn, AskedAndUsed, PlacesOfTwo)
