"""Spelling P7 as modules: counts moved to the host, rows split or sliced, and scattered back."""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K
from torch import nn


class Mlp(nn.Module):
    """Gated expert."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(H, WIDTH, bias=False), nn.Linear(H, WIDTH, bias=False)
        self.down_proj = nn.Linear(WIDTH, H, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A softmax router with renormalised weights over a list of experts."""

    expert: type[nn.Module] = Mlp

    def __init__(self, experts=E, k=K):
        super().__init__()
        self.router = nn.Linear(H, experts, bias=False)
        self.experts = nn.ModuleList(self.expert() for _ in range(experts))
        self.num_experts, self.k = experts, k

    def route(self, x):
        w, idx = torch.topk(F.softmax(self.router(x), dim=-1), self.k, dim=-1)
        return w / w.sum(-1, keepdim=True), idx


class CountsByScatter(Layer):
    """Counts by scatter, one run after the other, outputs appended and joined, rows put back by the permutation."""

    def forward(self, x):
        w, idx = self.route(x)
        counts = idx.new_zeros((idx.shape[0], len(self.experts)))
        counts.scatter_(1, idx, 1)
        tokens_per_expert = counts.sum(dim=0)
        order = idx.view(-1).argsort()
        sorted_tokens = x[order // idx.shape[1]]
        tokens_per_expert = tokens_per_expert.cpu().numpy()
        outputs = []
        start = 0
        for i, num_tokens in enumerate(tokens_per_expert):
            end = start + num_tokens
            if num_tokens == 0:
                continue
            expert = self.experts[i]
            outputs.append(expert(sorted_tokens[start:end]))
            start = end
        outs = torch.cat(outputs, dim=0) if len(outputs) else sorted_tokens.new_empty(0)
        new_x = torch.empty_like(outs)
        new_x[order] = outs
        out = new_x.view(*idx.shape, -1).type(w.dtype).mul_(w.unsqueeze(dim=-1)).sum(dim=1)
        return out.type(new_x.dtype)


class RunningEnds(Layer):
    """bincount to NumPy, running ends, rows added where they came from."""

    def forward(self, x):
        w, idx = self.route(x)
        flat, weights = idx.view(-1), w.view(-1, 1)
        y = torch.zeros_like(x)
        order = flat.argsort()
        ends = flat.bincount().cpu().numpy().cumsum(0)
        tokens = order // self.k
        for i, end in enumerate(ends):
            start = 0 if i == 0 else ends[i - 1]
            if start == end:
                continue
            expert = self.experts[i]
            rows = tokens[start:end]
            out = expert(x[rows])
            out.mul_(weights[order[start:end]])
            y.scatter_reduce_(0, rows.view(-1, 1).repeat(1, x.shape[-1]), out, reduce="sum")
        return y


class SplitAndCat(Layer):
    """split by a list of counts, a comprehension over experts, cat, index_add."""

    def forward(self, x):
        w, idx = self.route(x)
        flat = idx.flatten()
        order = torch.argsort(flat, stable=True)
        token = order // self.k
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        chunks = torch.split(x[token], counts, dim=0)
        outs = torch.cat([expert(chunk) for expert, chunk in zip(self.experts, chunks, strict=True)], dim=0)
        outs = outs * w.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, outs)


class SliceWrites(Layer):
    """Offsets with a leading zero; each run's output written to its slice."""

    def forward(self, x):
        w, idx = self.route(x)
        flat = idx.reshape(-1)
        _, order = torch.sort(flat)
        counts = F.one_hot(flat, self.num_experts).sum(0)
        offsets = [0, *itertools.accumulate(counts.tolist())]
        xs = x[order // self.k]
        ys = torch.empty_like(xs)
        for e in range(self.num_experts):
            start, end = offsets[e], offsets[e + 1]
            if end == start:
                continue
            ys[start:end] = self.experts[e](xs[start:end])
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel())
        return (ys[back].view(x.shape[0], self.k, -1) * w[..., None]).sum(1)


class RunningStart(Layer):
    """A running start that is advanced after each run; counts read by their place."""

    def forward(self, x):
        w, idx = self.route(x)
        flat = idx.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.histc(flat.float(), self.num_experts, 0, self.num_experts - 1).long().tolist()
        xs = x.repeat_interleave(self.k, dim=0)[order]
        outs = []
        base = 0
        for i in range(self.num_experts):
            size = counts[i]
            outs.append(self.experts[i](xs[base : base + size]))
            base += size
        ys = torch.cat(outs)
        unsorted = torch.zeros_like(ys).index_copy(0, order, ys)
        return torch.einsum("tk,tkh->th", w, unsorted.view(-1, self.k, x.shape[-1]))


class NumpyEdges(Layer):
    """np.cumsum of counts, edges looked up beside the experts."""

    def forward(self, x):
        w, idx = self.route(x)
        flat = idx.reshape(-1)
        order = flat.argsort()
        counts = torch.bincount(flat, minlength=self.num_experts).cpu().numpy()
        ends = np.cumsum(counts)
        token, weight = order // self.k, w.reshape(-1)[order]
        y = torch.zeros_like(x)
        for e, (size, end) in enumerate(zip(counts, ends, strict=True)):
            if size > 0:
                rows = token[end - size : end]
                y.index_add_(0, rows, self.experts[e](x[rows]) * weight[end - size : end, None])
        return y


class SlotMasks(Layer):
    """Each slot's row by a mask over flat choices, weights and sum over slots afterwards."""

    def forward(self, x):
        w, idx = self.route(x)
        flat = idx.view(-1)
        rows = x.repeat_interleave(self.k, dim=0)
        y = torch.empty_like(rows)
        for i, expert in enumerate(self.experts):
            y[flat == i] = expert(rows[flat == i]).to(y.dtype)
        return (y.view(*w.shape, -1) * w.unsqueeze(-1)).sum(dim=1)
