"""Spellings P8 (one-hot capacity einsum) and P10 (expert choice) as data: one record an example."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K, Listed, Routed, Spelling, Stacked, batches, tokens
from torch import nn


class Top1(Routed):
    """One expert a token; the place counted from 1; dispatch where the weight is positive."""

    def forward(self, x):
        capacity = max(1, int(self.factor * x.shape[0] / E))
        gate, chosen = F.softmax(self.router(x), dim=-1).max(-1)
        mask = F.one_hot(chosen, E)
        place = torch.cumsum(mask, 0) * mask
        mask = mask * (place <= capacity)
        place = ((place - 1) * mask).sum(-1)
        gate = gate * mask.sum(-1)
        combine = gate[:, None, None] * mask[:, :, None] * F.one_hot(place, capacity)[:, None, :]
        rows = torch.einsum("tec,th->ech", (combine > 0).to(x.dtype), x)
        return torch.einsum("tec,ech->th", combine.to(x.dtype), self.experts(rows))


class Top2(Routed):
    """The second choice is the best of the others and queues behind all first ones; an auxiliary loss."""

    experts_of = Listed

    def forward(self, x):
        gates = F.softmax(self.router(x), dim=1)
        capacity = max(4, math.ceil(2 * self.factor * x.shape[0] / E))
        first = torch.argmax(gates, 1)
        mask1 = F.one_hot(first, E)
        second = torch.argmax(gates.masked_fill(mask1.bool(), float("-inf")), 1)
        mask2 = F.one_hot(second, E)
        at1 = torch.cumsum(mask1, 0) - 1
        at2 = torch.cumsum(mask2, 0) - 1
        at2 += torch.sum(mask1, 0, keepdim=True)
        aux = (gates.mean(0) * mask1.float().mean(0)).mean() * E * E
        mask1 *= torch.lt(at1, capacity)
        mask2 *= torch.lt(at2, capacity)
        at1, at2 = torch.sum(at1 * mask1, 1), torch.sum(at2 * mask2, 1)
        g1, g2 = (torch.einsum("se,se->s", gates, m.float()) for m in (mask1, mask2))
        total = torch.clamp(g1 + g2, min=torch.finfo(g1.dtype).eps)
        g1 = torch.einsum("s,se->se", g1 / total, mask1.float())
        g2 = torch.einsum("s,se->se", g2 / total, mask2.float())
        combine = torch.einsum("se,sc->sec", g1, F.one_hot(at1, capacity).float())
        combine = combine + torch.einsum("se,sc->sec", g2, F.one_hot(at2, capacity).float())
        rows = torch.einsum("sec,sm->ecm", combine.bool().type_as(x), x)
        return torch.einsum("sec,ecm->sm", combine.type_as(x), self.experts(rows)), aux


class TopK(Routed):
    """All first choices queue before all second ones; an even capacity; the table viewed as a matrix."""

    def forward(self, x):
        shape = x.shape
        x = x.view(-1, H)
        count = x.shape[0]
        capacity = math.floor(K * self.factor * count / E)
        capacity = max(capacity + capacity % 2, 4)
        best, chosen = self.router(x).topk(K, dim=-1)
        scores = torch.full((count, E), float("-inf")).scatter_(-1, chosen, best)
        mask = F.one_hot(chosen, E).permute(1, 0, 2)
        rank = (torch.cumsum(mask.reshape(K * count, E), 0) - 1).reshape(K, count, E)
        mask = mask * torch.lt(rank, capacity)
        rank = torch.sum(mask * rank, dim=-1)
        weights = mask * F.softmax(scores, dim=-1)[None]
        table = torch.sum(weights.unsqueeze(3) * F.one_hot(rank, capacity).unsqueeze(2), 0)
        rows = table.bool().permute(1, 2, 0).type_as(x) @ x
        return (table.view(count, -1) @ self.experts(rows).view(-1, H)).view(shape)


class Groups(nn.Module):
    """Groups of tokens with queues of their own, padded capacity, a second choice dropped at random, einsum experts."""

    def __init__(self, factor=1.0, random=True):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.factor, self.random = factor, random
        self.w1, self.w2 = nn.Parameter(torch.randn(E, H, WIDTH) * 0.2), nn.Parameter(torch.randn(E, WIDTH, H) * 0.2)
        self.b1, self.b2 = nn.Parameter(torch.randn(E, WIDTH)), nn.Parameter(torch.randn(E, 1, H))

    def forward(self, x):
        capacity = -(-max(4, int(x.shape[1] * 2 * self.factor / E)) // 4) * 4
        scores = self.router(x).softmax(-1)
        g1, first = scores.max(-1)
        mask1 = F.one_hot(first, E).float()
        g2, second = (scores * (1 - mask1)).max(-1)
        mask2 = F.one_hot(second, E).float()
        total = g1 + g2 + 1e-9
        g1, g2 = g1 / total, g2 / total
        if self.random:
            mask2 = mask2 * (torch.rand_like(g2) < g2 / 0.2).float().unsqueeze(-1)
        at1 = (torch.cumsum(mask1, -2) - mask1) * mask1
        mask1 = mask1 * (at1 < capacity).float()
        at2 = (torch.cumsum(mask2, -2) - mask2 + mask1.sum(-2, keepdim=True)) * mask2
        mask2 = mask2 * (at2 < capacity).float()
        table = 0
        for gate, chosen, at, mask in ((g1, first, at1, mask1), (g2, second, at2, mask2)):
            kept, seat = mask.sum(-1), F.one_hot((at * mask).sum(-1).long(), capacity)
            table = table + (gate * kept)[..., None, None] * F.one_hot(chosen, E)[..., None] * seat[..., None, :]
        rows = torch.einsum("gsd,gsec->egcd", x, table.bool().to(table))
        h = F.gelu(torch.einsum("egcd,edf->egcf", rows, self.w1) + self.b1[:, None, None])
        return torch.einsum("egcd,gsec->gsd", torch.einsum("egcf,efd->egcd", h, self.w2) + self.b2[:, None], table)


class Counted(Routed):
    """Seats by comparison with arange, which leaves out what is beyond them; a token's choices one after another."""

    experts_of = Listed

    def forward(self, x):
        count = x.shape[0]
        capacity = math.ceil(2 * count * self.factor / E)
        w, chosen = self.choose(x)
        hot = F.one_hot(chosen, E)
        flat = hot.view(-1, E)
        place = ((flat.cumsum(0) - 1) * flat).sum(-1).view(count, K)
        seat = (place.unsqueeze(-1) == torch.arange(capacity, device=x.device)).to(x.dtype)
        combine = torch.einsum("tk,tke,tkc->tec", w, hot.to(x.dtype), seat)
        dispatch = torch.einsum("tke,tkc->tec", hot.to(x.dtype), seat)
        return torch.einsum("tec,ech->th", combine, self.experts(torch.einsum("tec,th->ech", dispatch, x)))


class KeptPairs(Routed):
    """Conditions on pairs, not on pairs and experts."""

    def forward(self, x):
        count = x.shape[0]
        capacity = max(1, round(2 * count * self.factor / E))
        w, chosen = self.choose(x)
        onehot = F.one_hot(chosen.transpose(0, 1).reshape(-1), E)
        rank = ((torch.cumsum(onehot, 0) * onehot).sum(1) - 1).reshape(K, count).transpose(0, 1)
        kept = rank < capacity
        expert, seat = F.one_hot(chosen, E) * kept[..., None], F.one_hot(rank * kept, capacity).float()
        rows = torch.einsum("tec,th->ech", torch.einsum("tke,tkc->tec", expert.float(), seat), x)
        table = torch.einsum("tke,tkc->tec", expert * w[..., None], seat)
        return torch.einsum("ech,tec->th", self.experts(rows), table)


class PickedIndex(Routed):
    """Each expert's best tokens by x[ids], added back by index_add."""

    def seats(self, x):
        return max(1, int(self.factor * K * x.shape[0] / E))

    def forward(self, x):
        gate, ids = F.softmax(self.router(x), dim=-1).t().topk(self.seats(x), dim=-1)
        rows = self.experts(x[ids]) * gate[..., None]
        return torch.zeros_like(x).index_add(0, ids.reshape(-1), rows.reshape(-1, H))


class PickedList(PickedIndex):
    """Top-k along tokens, a list of experts, scatter_add."""

    experts_of = Listed

    def forward(self, x):
        gate, ids = F.softmax(self.router(x), dim=-1).topk(self.seats(x), dim=0)
        ids = ids.t()
        rows = x.index_select(0, ids.reshape(-1)).view(E, -1, H)
        rows = torch.stack([expert(rows[e]) for e, expert in enumerate(self.experts.experts)]) * gate.t().unsqueeze(-1)
        return torch.zeros_like(x).scatter_add(0, ids.reshape(-1, 1).expand(-1, H), rows.view(-1, H))


class PickedEinsum(PickedIndex):
    """A one-hot of the tokens that each expert takes."""

    def forward(self, x):
        gate, ids = F.softmax(self.router(x), dim=-1).t().topk(self.seats(x), dim=-1)
        table = F.one_hot(ids, x.shape[0]).to(x.dtype)
        rows = self.experts(torch.einsum("ect,th->ech", table, x))
        return torch.einsum("ect,ec,ech->th", table, gate, rows)


P8 = (Top1, Top2, TopK, Groups, Counted, KeptPairs)
P10 = (PickedIndex, PickedList, PickedEinsum)
BATCHED = (TopK, Groups)

SPELLINGS = (
    *(Spelling(kind.__name__, "P8", kind, batches if kind in BATCHED else tokens) for kind in P8),
    *(
        Spelling(f"{kind.__name__}{text}", "P8", lambda kind=kind, f=f: kind(f), batches if kind in BATCHED else tokens)
        for kind in P8
        for f, text in ((0.4, "Tight"), (float(E), "Ample"))
    ),
    *(Spelling(kind.__name__, "P10", kind, tokens) for kind in P10),
)
__all__ = ["P8", "P10", "SPELLINGS", "Stacked"]
