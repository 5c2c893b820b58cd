"""Spellings P7 (counts moved to the host), P13–P15 as data: one record an example, for one table over all spellings."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spelling import WIDTH, H, Spelling, tokens
from spellings_host import (
    CountsByScatter,
    Layer,
    NumpyEdges,
    RunningEnds,
    RunningStart,
    SliceWrites,
    SlotMasks,
    SplitAndCat,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

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
