"""Capacity routing that is left as it was, with a reason: not understood yet, and near misses."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from spelling import E, H, K, Routed
from spellings_dropped import LoopOfMlps


class SortedPlaces(Routed):
    """Places by a stable sort: the rank in the sorted order less where the expert's run begins."""

    def forward(self, x):
        capacity = max(1, math.ceil(self.factor * K * x.shape[0] / E))
        w, chosen = self.choose(x)
        flat = chosen.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=E)
        starts = counts.cumsum(0) - counts
        rank = torch.arange(flat.numel()) - starts[flat[order]]
        place = torch.empty_like(rank).scatter(0, order, rank)
        kept = place < capacity
        seat = torch.where(kept, flat * capacity + place, E * capacity)
        buffer = x.new_zeros(E * capacity + 1, H).index_copy(0, seat, x.repeat_interleave(K, 0))
        y = self.experts(buffer[:-1].view(E, capacity, H)).view(-1, H)
        y = torch.cat([y, y.new_zeros(1, H)])
        return (y[seat].view(-1, K, H) * w[..., None]).sum(1)


class TokenTable(Routed):
    """A table of token numbers by expert and seat; rows are read through it, and added back."""

    def forward(self, x):
        count = x.shape[0]
        capacity = max(1, math.ceil(self.factor * count / E))
        gate, chosen = F.softmax(self.router(x), dim=-1).max(-1)
        hot = F.one_hot(chosen, E)
        place = ((hot.cumsum(0) - 1) * hot).sum(-1)
        table = torch.full((E, capacity + 1), count)
        table[chosen, place.clamp(max=capacity)] = torch.arange(count)
        table = table[:, :capacity]
        rows = torch.cat([x, x.new_zeros(1, H)])[table]
        weights = torch.cat([gate, gate.new_zeros(1)])[table]
        y = self.experts(rows) * weights[..., None]
        return x.new_zeros(count + 1, H).index_add(0, table.reshape(-1), y.reshape(-1, H))[:count]


class TopNStacked(Routed):
    """Choices lead: masks [k, T, E], exclusive counts, earlier choices' kept rows first; stacked tables."""

    def forward(self, x):
        capacity = min(x.shape[0], int(x.shape[0] * self.factor * K / E))
        capacity = max(capacity, 4)
        gates = F.softmax(self.router(x), dim=-1)
        weights, index = gates.topk(k=K, dim=-1)
        weights, index = weights.permute(1, 0), index.permute(1, 0)
        weights = weights / weights.sum(0, keepdim=True).clamp(min=1e-9)
        masks = F.one_hot(index, E).float()
        before, tables = 0.0, []
        for n in range(K):
            mask = masks[n]
            place = ((mask.cumsum(dim=-2) - mask) + before) * mask
            mask = mask * (place < capacity).float()
            before = mask.sum(dim=-2, keepdim=True) + before
            gate = weights[n] * mask.sum(-1)
            seat = F.one_hot(place.sum(-1).long().clamp(max=capacity - 1), capacity).float()
            tables.append(gate[:, None, None] * mask.sum(-1)[:, None, None] * masks[n][:, :, None] * seat[:, None, :])
        table = torch.stack(tables).sum(0)
        rows = torch.einsum("tec,th->ech", table.bool().float(), x)
        return torch.einsum("ech,tec->th", self.experts(rows), table)


class LargestItem(Routed):
    """The same, as a number of Python's that sizes the table."""

    def forward(self, x):
        w, chosen = self.choose(x)
        hot = F.one_hot(chosen, E)
        capacity = int(torch.bincount(chosen.reshape(-1), minlength=E).max().item())
        flat = hot.view(-1, E)
        place = ((flat.cumsum(0) - 1) * flat).sum(-1).view(-1, K)
        seat = F.one_hot(place, capacity).to(x.dtype)
        table = torch.einsum("tke,tkc->tec", hot * w[..., None], seat)
        rows = torch.einsum("tec,th->ech", torch.einsum("tke,tkc->tec", hot.to(x.dtype), seat), x)
        return torch.einsum("tec,ech->th", table, self.experts(rows))


class Earlier(Routed):
    """Places without a running count: how many earlier tokens chose the same."""

    def forward(self, x):
        count = x.shape[0]
        capacity = max(1, math.ceil(self.factor * count / E))
        gate, chosen = F.softmax(self.router(x), dim=-1).max(-1)
        same = (chosen[:, None] == chosen[None, :]).tril(-1)
        place = same.sum(-1)
        kept = place < capacity
        combine = F.one_hot(chosen, E)[:, :, None] * F.one_hot(place.clamp(max=capacity - 1), capacity)[:, None]
        combine = combine * (gate * kept)[:, None, None]
        rows = torch.einsum("tec,th->ech", combine.bool().to(x), x)
        return torch.einsum("tec,ech->th", combine, self.experts(rows))


class Scattered(Routed):
    """A table [T, E] of places kept by scatter; seats by one wide one_hot of expert·C + place, cut at E·C."""

    def forward(self, x):
        count = x.shape[0]
        capacity = max(1, math.ceil(self.factor * K * count / E))
        w, chosen = self.choose(x)
        hot = torch.zeros(count, E, dtype=torch.long).scatter(1, chosen, 1)
        place = (hot.cumsum(0) - 1).gather(1, chosen)
        seat = torch.where(place < capacity, chosen * capacity + place, E * capacity)
        seats = F.one_hot(seat, E * capacity + 1)[..., :-1].to(x.dtype)
        rows = torch.einsum("tks,th->sh", seats, x).view(E, capacity, H)
        y = self.experts(rows).view(-1, H)
        return torch.einsum("tks,sh,tk->th", seats, y, w)


class Bins(Routed):
    """Rows by sorted order: seat c of expert e is row start[e] + c of it, where that is before the run's end."""

    def forward(self, x):
        capacity = max(1, math.ceil(self.factor * K * x.shape[0] / E))
        w, chosen = self.choose(x)
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        counts = F.one_hot(flat, E).sum(0)
        starts = counts.cumsum(0) - counts
        at = starts[:, None] + torch.arange(capacity)
        real = torch.arange(capacity) < counts[:, None]
        pair = order[at.clamp(max=flat.numel() - 1)]
        rows = x[pair // K] * real[..., None]
        y = self.experts(rows) * (w.reshape(-1)[pair] * real)[..., None]
        return torch.zeros_like(x).index_add(0, (pair // K).reshape(-1), y.reshape(-1, H))


class OtherOrder(Routed):
    """Near miss: places come back in the order of something else than what they were counted in."""

    def forward(self, x):
        capacity = max(1, int(0.5 * x.shape[0] / E))
        gate, chosen = F.softmax(self.router(x), dim=-1).max(dim=-1)
        order = torch.argsort(gate, descending=True)
        other = torch.argsort(x[:, 0])
        sorted_mask = F.one_hot(chosen, E)[order]
        place = (torch.cumsum(sorted_mask, 0) - sorted_mask)[torch.argsort(other)]
        mask = F.one_hot(chosen, E) * (place < capacity)
        at = (place * mask).sum(-1)
        combine = (gate[:, None] * mask).unsqueeze(-1) * F.one_hot(at, capacity).unsqueeze(1)
        rows = torch.einsum("tec,th->ech", combine.bool().to(x), x)
        return torch.einsum("tec,ech->th", combine, self.experts(rows))


class SomeOrder(Routed):
    """Near miss: what looks like an order of tokens names some of them twice."""

    def forward(self, x):
        w, chosen = self.choose(x)
        order = x[:, 0].argsort() // 2 * 2
        flat = F.one_hot(chosen[order], E).view(-1, E)
        rank = ((flat.cumsum(0) - 1) * flat).sum(-1).view(-1, K)
        place = torch.zeros_like(rank).scatter(0, order[:, None].expand(-1, K), rank)
        seat = F.one_hot(place, K * x.shape[0]).to(x.dtype)
        hot = F.one_hot(chosen, E).to(x.dtype)
        rows = torch.einsum("tec,th->ech", torch.einsum("tke,tkc->tec", hot, seat), x)
        return torch.einsum("tec,ech->th", torch.einsum("tke,tkc->tec", hot * w[..., None], seat), self.experts(rows))


class LastSeat(Routed):
    """Near miss: all that comes too late shares the last seat."""

    def forward(self, x):
        capacity = max(1, int(0.5 * K * x.shape[0] / E))
        w, chosen = self.choose(x)
        hot = F.one_hot(chosen, E)
        flat = hot.view(-1, E)
        place = ((flat.cumsum(0) - 1) * flat).sum(-1).view(-1, K)
        seat = F.one_hot(place.clamp(max=capacity - 1), capacity).to(x.dtype)
        hot = hot.to(x.dtype)
        rows = torch.einsum("tec,th->ech", torch.einsum("tke,tkc->tec", hot, seat), x)
        return torch.einsum("tec,ech->th", torch.einsum("tke,tkc->tec", hot * w[..., None], seat), self.experts(rows))


class WideClamp(Routed):
    """Near miss: places are cut one seat before the capacity that they are compared with."""

    def forward(self, x):
        capacity = max(2, int(0.5 * K * x.shape[0] / E))
        w, chosen = self.choose(x)
        hot = F.one_hot(chosen, E)
        flat = hot.view(-1, E)
        place = ((flat.cumsum(0) - 1) * flat).sum(-1).view(-1, K)
        kept = (place < capacity)[..., None]
        seat = (F.one_hot(place.clamp(max=capacity - 2), capacity) * kept).to(x.dtype)
        hot = hot.to(x.dtype)
        rows = torch.einsum("tec,th->ech", torch.einsum("tke,tkc->tec", hot, seat), x)
        return torch.einsum("tec,ech->th", torch.einsum("tke,tkc->tec", hot * w[..., None], seat), self.experts(rows))


class CutByExpert(LoopOfMlps):
    """Near miss: the mask that cuts the loop's rows is the loop's own, another for each expert."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where((chosen == e) & (x[:, :2] > 0.1 * e))
            y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


LEFT = (SortedPlaces, TokenTable, TopNStacked, Earlier, Scattered, Bins)
BROKEN = (LargestItem,)
"""Dynamo breaks its graph: `.item()`."""
NEAR = (OtherOrder, SomeOrder, LastSeat, WideClamp, CutByExpert)
