"""Layers in the manner of references: plain loops and gathers over stacked or flat matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K
from torch import nn


class Stacked(nn.Module):
    """A router, and three stacked matrices: w1, w3 [E, F, H] and w2 [E, H, F]."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.w1, self.w3 = (nn.Parameter(torch.randn(E, WIDTH, H) * 0.2) for _ in range(2))
        self.w2 = nn.Parameter(torch.randn(E, H, WIDTH) * 0.2)

    def route(self, x):
        """Weights and chosen experts, [T, K]."""
        weights, chosen = self.gate(x).softmax(-1).topk(K, dim=-1)
        return weights / weights.sum(-1, keepdim=True), chosen


def run_experts(w1, w2, w3, x, counts):
    """Rows in expert order, cut by counts on the host, one expert after the other."""
    counts = counts.tolist()
    parts = torch.split(x[: sum(counts)], split_size_or_sections=counts, dim=0)
    done = []
    for e, part in enumerate(parts):
        h = F.silu(torch.matmul(part, w1[e].transpose(-2, -1)))
        h = h * torch.matmul(part, w3[e].transpose(-2, -1))
        done.append(torch.matmul(h, w2[e].transpose(-2, -1)))
    return torch.cat(done, dim=0)


class FlatWeights(nn.Module):
    """All experts' matrices in one [E·F, H] parameter, viewed and chunked before the loop."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.w1, self.v1, self.w2 = (nn.Parameter(torch.randn(E * WIDTH, H) * 0.2) for _ in range(3))

    def forward(self, x):
        shape = x.shape
        x = x.view(-1, H)
        weights = self.gate(x).softmax(dim=-1, dtype=torch.float32)
        top, ids = torch.topk(weights, K, dim=-1)
        top = top / torch.norm(top, p=1, dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        chunks = [w.view(E, WIDTH, H).chunk(E, dim=0) for w in (self.w1, self.v1, self.w2)]
        w1, v1, w2 = ([part.squeeze(dim=0) for part in chunk] for chunk in chunks)
        for e in range(E):
            slot, token = torch.where(mask[e])
            if token.shape[0] == 0:
                continue
            rows = x[None, token].reshape(-1, H)
            done = (F.silu(rows.matmul(w1[e].t())) * rows.matmul(v1[e].t())).matmul(w2[e])
            out.index_add_(0, token, done * top[token, slot, None])
        return out.reshape(shape)


class NativeGather(Stacked):
    """One gathered [T, k, 2F, H] matrix for gate and up, split along the middle; three einsums."""

    def __init__(self):
        super().__init__()
        self.w13 = nn.Parameter(torch.randn(E, 2 * WIDTH, H) * 0.2)
        del self.w1, self.w3

    def forward(self, x):
        weights, ids = self.route(x)
        w1, w3 = torch.chunk(self.w13[ids], 2, dim=2)
        one = F.silu(torch.einsum("ti,taoi -> tao", x, w1))
        hidden = one * torch.einsum("ti, taoi -> tao", x, w3)
        outs = torch.einsum("tao, taio -> tai", hidden, self.w2[ids])
        return torch.einsum("tai,ta -> ti", outs, weights.to(outs.dtype))


class HalvesInTheLoop(NativeGather):
    """One [2F, H] matrix an expert, cut in two inside the loop."""

    def forward(self, x):
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            w1, w3 = self.w13[e].chunk(2, dim=0)
            hidden = F.silu(x[token] @ w1.t()) * (x[token] @ w3.t())
            out.index_add_(0, token, hidden @ self.w2[e].t() * weights[token, slot, None])
        return out


class HalvesBefore(NativeGather):
    """The stack is cut in two before weights are gathered."""

    def forward(self, x):
        weights, ids = self.route(x)
        w1, w3 = self.w13.chunk(2, dim=1)
        hidden = F.silu(torch.einsum("ti,tkoi->tko", x, w1[ids])) * torch.einsum("ti,tkoi->tko", x, w3[ids])
        return torch.einsum("tko,tkio,tk->ti", hidden, self.w2[ids], weights)


class FlatReference(Stacked):
    """Every token k times by repeat, a buffer of zeros, rows of each expert by a mask of the flat choice."""

    def forward(self, x):
        weights, ids = self.route(x)
        rows = x.view(x.shape[0], -1, H).repeat(1, K, 1).reshape(-1, H)
        out = torch.zeros(x.shape[0] * K, H, dtype=x.dtype, device=x.device)
        flat = ids.view(-1)
        for i in range(self.w1.shape[0]):
            mask = flat == i
            if mask.sum():
                hidden = F.silu(rows[mask] @ self.w1[i].t()) * (rows[mask] @ self.w3[i].t())
                out[mask] = hidden @ self.w2[i].t()
        return (out.view(x.shape[0], -1, H) * weights.view(x.shape[0], -1, 1).to(out.dtype)).sum(dim=1)


class EveryExpertInTurn(Stacked):
    """Every expert on every token, weighted by the sum of a mask; the first one starts the sum."""

    def forward(self, x):
        weights, ids = self.route(x)
        final = None
        for e in range(E):
            mask = ids == e
            weight = (weights * mask).sum(dim=-1, keepdim=True)
            hidden = F.silu(F.linear(x, self.w1[e])) * F.linear(x, self.w3[e])
            done = F.linear(hidden, self.w2[e]).mul_(weight)
            final = done if final is None else final.add_(done)
        return final


class LookedUp(Stacked):
    """Experts of a token by its number in a fixed table; only the weights are learned; rows in expert order."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, H)
        self.register_buffer("table", torch.rand(64, E).argsort(1)[:, :K].contiguous())

    def forward(self, numbers):
        x = self.embedding(numbers)
        scores = self.gate(x).sigmoid()
        chosen = self.table[numbers].long()
        weights = scores.gather(1, chosen)
        weights = (weights / (weights.sum(-1, keepdim=True) + 1e-20)).reshape(-1)
        ids, order = torch.sort(chosen.reshape(-1))
        rows = run_experts(
            self.w1, self.w2, self.w3, x[order // K], torch.histc(ids.float(), bins=E, min=0, max=E - 1).long()
        )
        rows = rows * weights[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel())
        return rows[back].view(-1, K, H).sum(1)
