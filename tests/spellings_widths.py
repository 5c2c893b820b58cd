"""Layers whose experts give rows of another width than they read, or are one matrix; one class a spelling."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import nn

H, F, E, K = 16, 24, 6, 2


class Towers(nn.Module):
    """A recommender's layer: two-layer towers of a module list, picked by a router, down to O numbers."""

    O, k = 5, K

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, F), nn.ReLU(), nn.Linear(F, self.O)) for _ in range(E))

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(self.k, dim=-1)
        out = x.new_zeros(x.shape[0], self.O)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class ValueHeads(Towers):
    """One number a token, of one expert."""

    O, k = 1, 1


class Widening(Towers):
    """Wider than what is read, every expert chosen."""

    O, k = 40, E


class Stacked(nn.Module):
    """Gated experts in stacks, sorted rows, a width that no tile divides."""

    O, k = 37, K

    def __init__(self):
        super().__init__()
        self.router = nn.Parameter(torch.randn(E, H) * 0.3)
        self.up = nn.Parameter(torch.randn(E, H, 2 * F) * 0.2)
        self.down = nn.Parameter(torch.randn(E, F, self.O) * 0.2)
        self.bias = nn.Parameter(torch.randn(E, self.O) * 0.2)

    def routed(self, x):
        weights, ids = nnf.linear(x, self.router).softmax(-1).topk(self.k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids

    def forward(self, x):
        weights, ids = self.routed(x)
        out = torch.zeros(x.shape[0], self.O, dtype=x.dtype)
        for e in range(E):
            token, slot = torch.where(ids == e)
            gate, up = (x[token] @ self.up[e]).chunk(2, dim=-1)
            y = (nnf.silu(gate) * up) @ self.down[e] + self.bias[e]
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


class Gathered(Stacked):
    """Matrices gathered for each token and slot."""

    O = 3

    def forward(self, x):
        weights, ids = self.routed(x)
        gate, up = torch.einsum("th,tkhf->tkf", x, self.up[ids]).chunk(2, dim=-1)
        y = torch.einsum("tkf,tkfo->tko", nnf.silu(gate) * up, self.down[ids]) + self.bias[ids]
        return (y * weights.unsqueeze(-1)).sum(1)


class Dense(Stacked):
    """Every expert on every token, gates that are zero but at the chosen."""

    O = 17

    def forward(self, x):
        weights, ids = self.routed(x)
        gates = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, weights)
        gate, up = torch.einsum("th,ehf->etf", x, self.up).chunk(2, dim=-1)
        y = torch.einsum("etf,efo->eto", nnf.silu(gate) * up, self.down)
        return torch.einsum("eto,te->to", y, gates)


class DenseThenGathered(Stacked):
    """Every expert on every token, then the rows of the chosen."""

    O = 9

    def forward(self, x):
        weights, ids = self.routed(x)
        gate, up = torch.einsum("th,ehf->tef", x, self.up).chunk(2, dim=-1)
        y = torch.einsum("tef,efo->teo", nnf.silu(gate) * up, self.down)
        chosen = y.gather(1, ids.unsqueeze(-1).expand(-1, -1, y.shape[-1]))
        return (chosen * weights.unsqueeze(-1)).sum(1)


class Sorted(Stacked):
    """Rows in the order of experts, a slice of them an expert, put back and summed."""

    O = 8

    def forward(self, x):
        weights, ids = self.routed(x)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        rows = x[order // self.k]
        counts = torch.bincount(flat, minlength=E)
        made = []
        begin = 0
        for e, n in enumerate(counts.tolist()):
            gate, up = (rows[begin : begin + n] @ self.up[e]).chunk(2, dim=-1)
            made.append((nnf.silu(gate) * up) @ self.down[e])
            begin += n
        y = torch.cat(made)[order.argsort()].view(x.shape[0], self.k, self.O)
        return (y * weights.unsqueeze(-1)).sum(1)


class Sequences(Towers):
    """Tokens on two axes."""

    O = 7

    def forward(self, x):
        batch, length, _ = x.shape
        return super().forward(x.reshape(-1, H)).view(batch, length, self.O)


TWO = (Towers, ValueHeads, Widening, Stacked, Gathered, Dense, DenseThenGathered, Sorted, Sequences)


class OneLinear(nn.Module):
    """One linear layer an expert, in a module list."""

    O, k = 10, K

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.heads = nn.ModuleList(nn.Linear(H, self.O) for _ in range(E))

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(self.k, dim=-1)
        out = x.new_zeros(x.shape[0], self.O)
        for e, head in enumerate(self.heads):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, head(x[token]) * weights[token, slot, None])
        return out


class ActionHeads(nn.Module):
    """Matrices gathered for the one head of each row, with a squashing behind."""

    O = 3

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E)
        self.weight = nn.Parameter(torch.randn(E, H, self.O) * 0.3)
        self.bias = nn.Parameter(torch.randn(E, self.O) * 0.3)

    def forward(self, x):
        weight, ids = self.gate(x).softmax(-1).max(dim=-1)
        y = torch.einsum("th,tho->to", x, self.weight[ids]) + self.bias[ids]
        return torch.tanh(y) * weight.unsqueeze(-1)


class ValuesByEinsum(ActionHeads):
    """One number of each chosen expert."""

    O = 1

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        y = torch.einsum("th,tkho->tko", x, self.weight[ids]) + self.bias[ids]
        return (y * weights.unsqueeze(-1)).sum(1)


class GatheredLinears(ActionHeads):
    """The same for k slots, as batched products."""

    O = 2

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        y = torch.matmul(x[:, None, None, :], self.weight[ids]).squeeze(2) + self.bias[ids]
        return (y * weights.unsqueeze(-1)).sum(dim=1)


class DenseLinears(ActionHeads):
    """All experts on all tokens as one einsum, gates zero but at the chosen."""

    O = 18

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        top, ids = scores.topk(K, dim=-1)
        gates = torch.zeros_like(scores).scatter(1, ids, top)
        return torch.einsum("be,beo->bo", gates, torch.einsum("bh,eho->beo", x, self.weight))


class SortedLinears(ActionHeads):
    """Rows in the order of experts, one product a slice."""

    O = 33

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        rows = x[order // K]
        counts = torch.bincount(flat, minlength=E)
        made, begin = [], 0
        for e, n in enumerate(counts.tolist()):
            made.append(rows[begin : begin + n] @ self.weight[e])
            begin += n
        y = torch.cat(made)[order.argsort()].view(x.shape[0], K, self.O)
        return (y * weights.unsqueeze(-1)).sum(1)


class LowRank(nn.Module):
    """A linear layer with low-rank experts beside it, scaled."""

    rank, alpha, O = 4, 8, 12

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(H, self.O)
        self.router = nn.Linear(H, E, bias=False)
        self.lora_a = nn.ModuleList(nn.Linear(H, self.rank, bias=False) for _ in range(E))
        self.lora_b = nn.ModuleList(nn.Linear(self.rank, self.O, bias=False) for _ in range(E))
        self.scaling = self.alpha / self.rank

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(K, dim=-1)
        out = self.base(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            delta = self.lora_b[e](self.lora_a[e](x[token])) * self.scaling
            out = out.index_add(0, token, delta * weights[token, slot, None])
        return out


class StackedLowRank(LowRank):
    """The same with stacks and gathered matrices."""

    O = 20

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(E, H, self.rank) * 0.3)
        self.b = nn.Parameter(torch.randn(E, self.rank, self.O) * 0.3)

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(K, dim=-1)
        low = torch.einsum("th,tkhr->tkr", x, self.a[ids])
        delta = torch.einsum("tkr,tkro->tko", low, self.b[ids]) * self.scaling
        return self.base(x) + (delta * weights.unsqueeze(-1)).sum(1)


class GatedLinear(nn.Module):
    """Gated without an output matrix: half of a product is the gate of the other half."""

    O, k = 13, 3

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.weight = nn.Parameter(torch.randn(E, 2 * self.O, H) * 0.3)

    def forward(self, x):
        weights, ids = self.router(x).sigmoid().topk(self.k, dim=-1)
        out = torch.zeros(x.shape[0], self.O, dtype=x.dtype)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, nnf.glu(nnf.linear(x[token], self.weight[e])) * weights[token, slot, None])
        return out


ONE = (
    *(OneLinear, ActionHeads, ValuesByEinsum, GatheredLinears, DenseLinears, SortedLinears),
    *(LowRank, StackedLowRank, GatedLinear),
)


class SoftMixtures(ActionHeads):
    """A softmax over all experts for each of two tasks, over the same rows."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(H, E) for _ in range(2))

    def forward(self, x):
        rows = torch.einsum("bh,eho->beo", x, self.weight)
        return torch.cat([torch.einsum("be,beo->bo", gate(x).softmax(-1), rows) for gate in self.gates], -1)


class ScaledBias(ActionHeads):
    """A number times an output with its bias, behind a product of another matrix."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, H, H) * 0.3)

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        y = torch.einsum("tkf,tkfo->tko", torch.einsum("th,tkhf->tkf", x, self.up[ids]), self.weight[ids])
        return ((y + self.bias[ids]) * 0.5 * weights.unsqueeze(-1)).sum(1)


class OneVector(ActionHeads):
    """Vectors, not matrices: one number of each token and expert."""

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        y = torch.einsum("th,tkh->tk", x, self.weight[..., 0][ids])
        return (y * weights).sum(1, keepdim=True)


NEAR = (
    (SoftMixtures, "every expert counts for every token"),
    (ScaledBias, "multiplied by 0.5"),
    (OneVector, "`mul` of no rows"),
)
