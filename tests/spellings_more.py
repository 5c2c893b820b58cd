"""Spellings P7 (counts moved to the host), P13–P15 as data: one record an example, for one table over all spellings."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K, Spelling, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint


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


P7 = (CountsByScatter, RunningEnds, SplitAndCat, SliceWrites, RunningStart, NumpyEdges, SlotMasks)

SPELLINGS: tuple[Spelling, ...] = tuple(
    Spelling(kind.__name__, "P7", kind, tokens, trains=kind is not RunningEnds) for kind in P7
)


class LinearExpert(nn.Linear):
    """One matrix and a bias."""

    def __init__(self):
        super().__init__(H, H)


class ConvExpert(nn.Module):
    """A convolution over the features of each row."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv1d(1, 2, 3, padding=1), nn.Linear(2 * H, H)

    def forward(self, x):
        return self.out(F.relu(self.conv(x.unsqueeze(1))).flatten(1))


class NormExpert(nn.Module):
    """A normalised MLP with dropout switched off."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(H, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, H)

    def forward(self, x):
        return self.down(F.silu(self.norm(self.up(x))))


class LoraExpert(nn.Module):
    """An MLP whose matrices carry low-rank additions."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, WIDTH, bias=False), nn.Linear(WIDTH, H, bias=False)
        self.up_a, self.up_b = nn.Linear(H, 3, bias=False), nn.Linear(3, WIDTH, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x) + 0.5 * self.up_b(self.up_a(x))))


class AttentionExpert(nn.Module):
    """Attention among the rows that an expert has; the running sum makes their order matter."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(H, H, bias=False) for _ in range(3))

    def forward(self, x):
        q, k, v = self.q(x).unsqueeze(0), self.k(x).unsqueeze(0), self.v(x).cumsum(0).unsqueeze(0)
        return (torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v).squeeze(0)


class OpaqueWhere(Layer):
    """where on a mask, index_add_."""

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(idx == e)
            if token.numel() == 0:
                continue
            y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


class OpaqueHits(Layer):
    """Hit experts by a permuted one-hot: rows ordered by slot, then token."""

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        mask = F.one_hot(idx, num_classes=self.num_experts).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            e = e[0]
            slot, token = torch.where(mask[e])
            y.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return y


class OpaqueRuns(SplitAndCat):
    """Counts on the host, split and cat, over experts of their own kind."""


class OpaqueMasks(Layer):
    """Boolean masks, weights summed over slots, rows added in place."""

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for e in range(self.num_experts):
            mask = (idx == e).any(-1)
            weight = (w * (idx == e)).sum(-1)
            if mask.any():
                y[mask] += weight[mask].unsqueeze(-1) * self.experts[e](x[mask])
        return y


def with_expert(layer: type[Layer], expert: type[nn.Module]) -> Callable[[], nn.Module]:
    """The layer over experts of another kind."""
    return type(f"{layer.__name__}Of{expert.__name__}", (layer,), {"expert": expert})


P13 = (
    (OpaqueWhere, LinearExpert),
    (OpaqueWhere, NormExpert),
    (OpaqueHits, ConvExpert),
    (OpaqueHits, AttentionExpert),
    (OpaqueRuns, LoraExpert),
    (OpaqueMasks, LoraExpert),
)

SPELLINGS += tuple(Spelling(f"{a.__name__}-{b.__name__}", "P13", with_expert(a, b), tokens) for a, b in P13)


class TwoInputs(nn.Module):
    """One layer on two inputs."""

    def __init__(self):
        super().__init__()
        self.layer = OpaqueWhere()

    def forward(self, x):
        return self.layer(x) + self.layer(x.flip(0) * 0.5)


class Checkpointed(nn.Module):
    """Blocks that are computed again in the backward pass."""

    layer: type[Layer] = OpaqueWhere

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.layer() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


class CheckpointedHits(Checkpointed):
    """The same over hit experts."""

    layer = OpaqueHits


class Repeated(nn.Module):
    """One layer several times, as a recurrent block."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = OpaqueMasks(), nn.LayerNorm(H)

    def forward(self, x):
        step = 0
        while step < 3:
            x = x + self.layer(self.norm(x))
            step += 1
        return x


class TwoLevels(OpaqueWhere):
    """Each expert is a layer of experts."""

    expert = SlotMasks


class LoadCounts(OpaqueWhere):
    """How many tokens each expert had, summed over calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("load", torch.zeros(self.num_experts, dtype=torch.long))

    def route(self, x):
        w, idx = super().route(x)
        with torch.no_grad():
            self.load += F.one_hot(idx.view(-1), self.num_experts).sum(0)
        return w, idx


class MovingLoad(OpaqueHits):
    """A bias on the choice that follows a moving average of the load."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.full((self.num_experts,), 1 / self.num_experts))

    def route(self, x):
        scores = torch.sigmoid(self.router(x))
        idx = torch.topk(scores - 0.1 * self.average, self.k, dim=-1)[1]
        w = scores.gather(1, idx)
        with torch.no_grad():
            share = F.one_hot(idx, self.num_experts).sum((0, 1)).float() / max(idx.numel(), 1)
            self.average.mul_(0.9).add_(share, alpha=0.1)
        return w / w.sum(-1, keepdim=True), idx


class UnitRouter(OpaqueMasks):
    """Router weights that are normalised in place at every call."""

    def route(self, x):
        with torch.no_grad():
            self.router.weight.copy_(F.normalize(self.router.weight, dim=-1))
        return super().route(x)


class CountedRuns(CountsByScatter):
    """bincount into a buffer beside runs whose counts are on the host."""

    def __init__(self):
        super().__init__()
        self.register_buffer("load", torch.zeros(self.num_experts))

    def route(self, x):
        w, idx = super().route(x)
        self.load += torch.histc(idx.float(), self.num_experts, 0, self.num_experts - 1)
        return w, idx


class DictItems(Layer):
    """A dictionary of experts, by name and place."""

    def __init__(self):
        super().__init__()
        self.named = nn.ModuleDict({f"expert_{i}": expert for i, expert in enumerate(self.experts)})
        del self.experts

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for i, (_, expert) in enumerate(self.named.items()):
            token, slot = torch.where(idx == i)
            y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


SPELLINGS += (
    Spelling("DictItems", "P1", DictItems, tokens),
    Spelling("TwoInputs", "P14", TwoInputs, tokens, sites=2),
    Spelling("Checkpointed", "P14", Checkpointed, tokens, sites=2),
    Spelling("CheckpointedHits", "P14", CheckpointedHits, tokens, sites=2),
    Spelling("Repeated", "P14", Repeated, tokens, sites=3),
    Spelling("TwoLevels", "P14", TwoLevels, tokens),
    *(Spelling(kind.__name__, "P15", kind, tokens) for kind in (LoadCounts, MovingLoad, UnitRouter, CountedRuns)),
)
