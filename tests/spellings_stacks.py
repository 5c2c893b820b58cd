"""Layers in the manner of serving and training stacks: reordered tokens, routing maps, gathered weights, references."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, Gated, H, K, Spelling, batches, tokens
from spellings_references import (
    EveryExpertInTurn,
    FlatReference,
    FlatWeights,
    HalvesBefore,
    HalvesInTheLoop,
    LookedUp,
    NativeGather,
    Stacked,
    run_experts,
)
from torch import nn


class Reordered(Stacked):
    """Sorted rows, weighted before the experts, split by counts, added to the shared expert's."""

    def __init__(self):
        super().__init__()
        self.shared = Gated()
        self.register_buffer("bias", torch.randn(E) * 0.1)
        self.register_buffer("load", torch.zeros(E))

    def choose(self, x):
        """Sigmoid scores, a bias for the choice alone; how many rows each expert has."""
        scores = torch.sigmoid(self.gate(x).to(torch.float32))
        chosen = torch.topk(scores + self.bias, k=K, dim=1).indices
        top = scores.gather(dim=1, index=chosen)
        top = top / (top.sum(dim=-1, keepdim=True) + 1e-20)
        return top, chosen, torch.histc(chosen.view(-1).float(), bins=E, min=0, max=E - 1)

    def reorder(self, top, chosen):
        """Scores in expert order, and which token each row is."""
        order = torch.argsort(chosen.view(-1), stable=True)
        return top.view(-1)[order], order, order // K

    def grouped(self, rows, counts):
        """Each expert on its part of the rows."""
        return run_experts(self.w1, self.w2, self.w3, rows, counts.long())

    def forward(self, x):
        shape = x.shape
        x = x.view(-1, H)
        top, chosen, counts = self.choose(x)
        with torch.no_grad():
            self.load.add_(counts)
        top, _, token = self.reorder(top, chosen)
        wide = token.reshape(-1, 1).expand(-1, H)
        rows = torch.gather(x, dim=0, index=wide)
        rows = (rows.to(torch.float32) * top.reshape(-1, 1)).to(x.dtype)
        out = self.shared(x).scatter_add(dim=0, index=wide, src=self.grouped(rows, counts))
        return out.reshape(shape)


class ReorderedBmm(Reordered):
    """Rows put back where they were, and weighted by a product of a row of scores with a token's rows."""

    def forward(self, x):
        shape = x.shape
        x = x.view(-1, H)
        top, chosen, counts = self.choose(x)
        _, order, token = self.reorder(top, chosen)
        rows = self.grouped(x[token], counts)
        back = torch.zeros((x.shape[0] * K, H), dtype=rows.dtype)
        back[order] = rows
        back = back.reshape(-1, K, H)
        out = torch.bmm(top.reshape(-1, 1, K), back.float()).to(x.dtype).squeeze(1)
        return (self.shared(x) + out).reshape(shape)


class RoutingMap(nn.Module):
    """A map [T, E] of who goes where; tokens and weights by masked_select, one expert after the other."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Gated() for _ in range(E))

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, H)
        logits = self.gate(x)
        scores, top = torch.topk(logits, k=K, dim=1)
        gates = torch.zeros_like(logits).scatter(
            1, top, torch.softmax(scores, dim=-1, dtype=torch.float32).type_as(logits)
        )
        routing = torch.zeros_like(logits).int().scatter(1, top, 1).bool()
        counts = routing.sum(dim=0)
        turned = routing.T.contiguous()
        token = torch.arange(x.shape[0]).unsqueeze(0).expand(E, -1).masked_select(turned)
        rows = x.index_select(0, token)
        weights = gates.T.contiguous().masked_select(turned)
        parts = torch.split(rows, counts.tolist())
        done = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        done = done * weights.unsqueeze(-1)
        out = torch.zeros(x.shape, dtype=done.dtype)
        out.scatter_add_(0, token.unsqueeze(1).expand(-1, H), done)
        return out.reshape(shape)


class RowsByToken(RoutingMap):
    """Near miss: rows in the order of tokens, cut by the counts of experts."""

    def forward(self, x):
        logits = self.gate(x)
        top = logits.topk(K, dim=1).indices
        routing = torch.zeros_like(logits, dtype=torch.bool).scatter(1, top, True)
        token = torch.arange(x.shape[0]).unsqueeze(1).expand(-1, E).masked_select(routing)
        parts = torch.split(x.index_select(0, token), routing.sum(dim=0).tolist())
        done = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(x).scatter_add(0, token.unsqueeze(1).expand(-1, H), done)


class WeightsOfOthers(RoutingMap):
    """Near miss: weights are picked by the map of the experts that were not chosen."""

    def forward(self, x):
        gates = self.gate(x).softmax(-1)
        top = gates.topk(E // 2, dim=1).indices
        routing = torch.zeros_like(gates, dtype=torch.bool).scatter(1, top, True)
        turned = routing.T.contiguous()
        token = torch.arange(x.shape[0]).unsqueeze(0).expand(E, -1).masked_select(turned)
        weights = gates.T.masked_select(~turned)
        parts = torch.split(x[token], routing.sum(dim=0).tolist())
        done = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(x).scatter_add(0, token.unsqueeze(1).expand(-1, H), done * weights.unsqueeze(-1))


class LimitedGroups(nn.Module):
    """Groups of experts by their best two; counts by bincount; where(chosen == e); a shared expert."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, H) * 0.3)
        self.bias = nn.Parameter(torch.randn(8) * 0.1)
        self.experts = nn.ModuleList(Gated() for _ in range(8))
        self.shared = Gated()

    def route(self, x):
        scores = F.linear(x, self.weight).sigmoid()
        original = scores
        scores = (scores + self.bias).view(x.size(0), 4, -1)
        best = scores.topk(2, dim=-1)[0].sum(dim=-1)
        groups = best.topk(2, dim=-1)[1]
        mask = scores.new_ones(x.size(0), 4, dtype=torch.bool).scatter_(1, groups, False)
        scores = scores.masked_fill_(mask.unsqueeze(-1), float("-inf")).flatten(1)
        chosen = torch.topk(scores, K, dim=-1)[1]
        weights = original.gather(1, chosen)
        weights /= weights.sum(dim=-1, keepdim=True)
        weights *= 2.5
        return weights.type_as(x), chosen

    def forward(self, x):
        shape = x.size()
        x = x.view(-1, H)
        weights, chosen = self.route(x)
        y = torch.zeros_like(x)
        counts = torch.bincount(chosen.flatten(), minlength=8).tolist()
        for i in range(8):
            if counts[i] == 0:
                continue
            expert = self.experts[i]
            idx, top = torch.where(chosen == i)
            y[idx] += expert(x[idx]) * weights[idx, top, None]
        return (y + self.shared(x)).view(shape)


class GatheredBiases(nn.Module):
    """Matrices and biases gathered by the choice, einsums, a clamped interleaved gate, a residual."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E)
        self.w1 = nn.Parameter(torch.randn(E, 2 * WIDTH, H) * 0.2)
        self.b1 = nn.Parameter(torch.randn(E, 2 * WIDTH) * 0.1)
        self.w2 = nn.Parameter(torch.randn(E, H, WIDTH) * 0.2)
        self.b2 = nn.Parameter(torch.randn(E, H) * 0.1)

    def forward(self, x):
        t = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        experts = torch.topk(self.gate(t), k=K, dim=-1, sorted=True)
        weights, idx = F.softmax(experts.values, dim=1), experts.indices
        t = torch.einsum("beck,bk->bec", self.w1[idx, ...], t) + self.b1[idx, ...]
        glu, linear = t[..., ::2], t[..., 1::2]
        glu, linear = glu.clamp(min=None, max=7.0), linear.clamp(min=-7.0, max=7.0)
        t = glu * torch.sigmoid(1.702 * glu) * (linear + 1)
        t = torch.einsum("beck,bek->bec", self.w2[idx, ...], t)
        t += self.b2[idx, ...]
        return x + torch.einsum("bec,be->bc", t, weights)


class EveryTokenByArange(Stacked):
    """Scores −inf but at the chosen, then a sigmoid; every token gathered for every expert, weighted first."""

    def forward(self, x):
        x = x.view(-1, H)
        scores = self.gate(x)
        top, chosen = torch.topk(scores, 1, dim=1)
        scores = torch.full_like(scores, float("-inf")).scatter_(1, chosen, top).transpose(0, 1)
        places = torch.arange(x.shape[0]).view(1, -1).expand(scores.size(0), -1)
        scores = torch.sigmoid(scores)
        wide = places.reshape(-1, 1).expand(-1, H)
        rows = torch.gather(x, dim=0, index=wide) * scores.reshape(-1, 1)
        rows = rows.view(E, -1, H)
        hidden = F.silu(torch.bmm(rows, self.w1.transpose(1, 2))) * torch.bmm(rows, self.w3.transpose(1, 2))
        done = torch.bmm(hidden, self.w2.transpose(1, 2)).view(-1, H)
        return torch.zeros_like(x).scatter_add(dim=0, index=wide, src=done)


class SortedOnHost(nn.Module):
    """Counts of a scattered table as numpy, runs of sorted rows, idle experts skipped, rows put back by the sort."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Gated() for _ in range(E))

    def forward(self, x):
        shape = x.shape
        x = x.view(-1, H)
        weights, ids = self.gate(x).softmax(-1).topk(K, dim=-1, sorted=False)
        seen = ids.new_zeros((ids.shape[0], len(self.experts)))
        seen.scatter_(1, ids, 1)
        counts = seen.sum(dim=0)
        order = ids.view(-1).argsort()
        rows = x[order // ids.shape[1]]
        counts = counts.cpu().numpy()
        outputs = []
        start = 0
        for i, count in enumerate(counts):
            end = start + count
            if count == 0:
                continue
            expert = self.experts[i]
            outputs.append(expert(rows[start:end]))
            start = end
        outs = torch.cat(outputs, dim=0) if len(outputs) else rows.new_empty(0)
        new = torch.empty_like(outs)
        new[order] = outs
        y = new.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(dim=-1)).sum(dim=1).type(new.dtype)
        return y.view(*shape)


class RepeatedTokens(nn.Module):
    """Each token k times, every expert's rows written by a mask of the flat choice, weighted as [T, k, H]."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Gated() for _ in range(E))

    def forward(self, x):
        shape = x.shape
        weights, ids = self.gate(x.view(-1, H)).softmax(-1).topk(K, dim=-1)
        flat = ids.view(-1)
        x = x.view(-1, H).repeat_interleave(K, dim=0)
        y = torch.empty_like(x)
        for i, expert in enumerate(self.experts):
            y[flat == i] = expert(x[flat == i]).to(x.dtype)
        return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1).view(*shape)


class SparseLogits(nn.Module):
    """−inf but at the chosen, softmax over all experts, masks of whole tokens, gates read by mask and expert."""

    def __init__(self):
        super().__init__()
        self.gate, self.noise = nn.Linear(H, E), nn.Linear(H, E)
        self.experts = nn.ModuleList(Gated() for _ in range(E))

    def forward(self, x):
        logits = self.gate(x)
        top, ids = logits.topk(K, dim=-1)
        gates = torch.full_like(logits, float("-inf")).scatter(-1, ids, top).softmax(dim=-1)
        y = torch.zeros_like(x)
        flat, flat_gates = x.view(-1, x.size(-1)), gates.view(-1, gates.size(-1))
        for i, expert in enumerate(self.experts):
            mask = (ids == i).any(dim=-1)
            flat_mask = mask.view(-1)
            if flat_mask.any():
                done = expert(flat[flat_mask]) * flat_gates[flat_mask, i].unsqueeze(1)
                y[mask] += done.squeeze(1)
        return y


def numbered(count):
    """A number below 64 for each token."""
    return (torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(count)),)


SPELLINGS = (
    Spelling("reordered", "P7", Reordered, batches),
    Spelling("reordered bmm", "P7", ReorderedBmm, batches),
    Spelling("routing map", "P7", RoutingMap, batches),
    Spelling("limited groups", "P1", LimitedGroups, batches),
    Spelling("gathered biases", "P5", GatheredBiases, tokens),
    Spelling("sorted on host", "P7", SortedOnHost, batches),
    Spelling("repeated tokens", "P1", RepeatedTokens, batches),
    Spelling("sparse logits", "P1", SparseLogits, batches),
    Spelling("flat weights", "P3", FlatWeights, batches),
    Spelling("native gather", "P5", NativeGather, tokens),
    Spelling("halves in the loop", "P3", HalvesInTheLoop, tokens),
    Spelling("halves before", "P5", HalvesBefore, tokens),
    Spelling("flat reference", "P3", FlatReference, tokens),
    Spelling("every expert in turn", "P9", EveryExpertInTurn, tokens),
    Spelling("looked up", "P7", LookedUp, numbered),
    Spelling("every token by arange", "P1", EveryTokenByArange, tokens),
)

LEFT_ALONE = (RowsByToken, WeightsOfOthers)
"""Declined, with a reason."""
