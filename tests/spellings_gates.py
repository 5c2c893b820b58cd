"""Ways to write capacity gates in which an expert's mask is one table of tokens and experts, whatever k is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spelling import E, K, Listed, Routed, Spelling, Stacked, batches, tokens


class Table(Routed):
    """A mask [T, E] scattered at the choices, places of every expert, one one_hot of them all."""

    experts_of = Listed

    def kept(self, logits, gates, mask, capacity):
        """The mask of kept pairs and their places."""
        places = torch.cumsum(mask, dim=0) - 1
        mask *= torch.lt(places, capacity)
        return mask, places

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        logits = self.router(x)
        top, chosen = torch.topk(logits, k=K, dim=1)
        gates = F.softmax(logits, dim=1)
        masked = torch.zeros_like(logits).scatter(1, chosen, top)
        mask = torch.zeros_like(gates, dtype=torch.bool).scatter_(1, chosen, 1)
        counts = torch.sum(mask, dim=0).detach().float()
        aux = torch.mean(gates.mean(0) * mask.float().mean(0)) * E * E / K
        capacity = max(math.ceil(x.shape[0] * K / E * self.factor), 2)
        mask, places = self.kept(masked, gates, mask, capacity)
        gated = gates * mask
        gated = gated / torch.clamp(gated.sum(-1, keepdim=True), min=torch.finfo(gated.dtype).eps)
        seats = F.one_hot(places * mask, num_classes=capacity).float()
        combine = torch.einsum("se,sec->sec", gated, seats)
        rows = torch.einsum("sec,sm->ecm", combine.bool().type_as(x), x)
        y = torch.einsum("sec,ecm->sm", combine.type_as(x), self.experts(rows))
        return y.reshape(shape), aux, counts


class TableByScore(Table):
    """Each expert keeps the tokens that score best with it, and counts places of those alone."""

    def kept(self, logits, gates, mask, capacity):
        capacity = min(capacity, logits.shape[0])
        _, best = torch.topk(logits, k=capacity, dim=0, sorted=False)
        mask = torch.logical_and(mask, torch.zeros_like(logits).scatter(0, best, 1))
        return mask, torch.cumsum(mask, dim=0) - 1


class BestOfOne(Routed):
    """One expert a token; each expert's mask times the scattered mask of its best tokens."""

    def forward(self, x):
        gates = F.softmax(self.router(x), dim=1)
        capacity = math.ceil(x.shape[0] / E * self.factor)
        mask = F.one_hot(torch.argmax(gates, dim=1), num_classes=E)
        aux = torch.sum(gates.mean(0) * mask.float().mean(0)) * E
        best = torch.topk(mask * gates, k=capacity, dim=0)[1]
        mask = mask * torch.zeros_like(mask).scatter_(0, best, 1)
        places = torch.sum((torch.cumsum(mask, dim=0) - 1) * mask, dim=1)
        combine = torch.einsum("se,sc->sec", gates * mask.float(), F.one_hot(places, num_classes=capacity).float())
        rows = torch.einsum("sec,sm->ecm", combine.bool().to(x.dtype), x)
        return torch.einsum("sec,ecm->sm", combine, self.experts(rows)), aux


class TableOfSeats(Routed):
    """Places of every expert compared with arange; a table of weights and one of ones; batched products."""

    def forward(self, x):
        w, chosen = self.choose(x)
        mask = torch.zeros(x.shape[0], E).scatter(1, chosen, 1.0)
        gates = torch.zeros(x.shape[0], E).scatter(1, chosen, w)
        capacity = math.ceil(x.shape[0] * K / E * self.factor)
        places = torch.cumsum(mask, 0) - 1.0
        seats = (places[..., None] == torch.arange(capacity)).float() * mask[..., None]
        rows = torch.einsum("tec,th->ech", seats, x)
        return torch.einsum("tec,ech->th", gates[..., None] * seats, self.experts(rows))


SPELLINGS = (
    Spelling("Table", "P8", Table, batches),
    Spelling("TableDrops", "P8", lambda: Table(0.5), batches),
    Spelling("TableByScore", "P8", TableByScore, batches),
    Spelling("BestOfOne", "P8", BestOfOne, tokens),
    Spelling("TableOfSeats", "P8", lambda: TableOfSeats(0.75), tokens),
)


class SeatsShared(Table):
    """Near miss: places are counted before the drop by score, so that two tokens may share a seat."""

    experts_of = Stacked

    def kept(self, logits, gates, mask, capacity):
        places = (torch.cumsum(mask, dim=0) - 1).remainder(capacity)
        return mask, places


class BestOfFewer(BestOfOne):
    """Near miss: experts keep a token more than they have seats for, and two share the last."""

    def forward(self, x):
        gates = F.softmax(self.router(x), dim=1)
        capacity = math.ceil(x.shape[0] / E * self.factor)
        mask = F.one_hot(torch.argmax(gates, dim=1), num_classes=E)
        best = torch.topk(mask * gates, k=capacity + 1, dim=0)[1]
        mask = mask * torch.zeros_like(mask).scatter_(0, best, 1)
        places = torch.sum((torch.cumsum(mask, dim=0) - 1) * mask, dim=1).clamp(max=capacity - 1)
        combine = torch.einsum("se,sc->sec", gates * mask.float(), F.one_hot(places, num_classes=capacity).float())
        rows = torch.einsum("sec,sm->ecm", combine.bool().to(x.dtype), x)
        return torch.einsum("sec,ecm->sm", combine, self.experts(rows))


class UnmaskedSeats(TableOfSeats):
    """Near miss: places of experts that a token did not choose have seats too."""

    def forward(self, x):
        chosen = self.choose(x)[1]
        mask = torch.zeros(x.shape[0], E).scatter(1, chosen, 1.0)
        gates = F.softmax(self.router(x), dim=-1)
        capacity = x.shape[0] + 1
        places = torch.cumsum(mask, 0)
        seats = (places[..., None] == torch.arange(capacity)).float()
        rows = torch.einsum("tec,th->ech", seats, x)
        return torch.einsum("tec,ech->th", gates[..., None] * seats, self.experts(rows))


NEAR = (SeatsShared, BestOfFewer, UnmaskedSeats)
