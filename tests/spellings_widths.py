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
