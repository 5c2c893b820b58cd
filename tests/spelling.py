"""The record of one way to write an MoE layer, and what examples are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, WIDTH, E, K = 16, 24, 4, 2


@dataclass(frozen=True)
class Spelling:
    """One way to write an MoE layer.

    name    of the example          spelling  P1 … P15
    make    builds the module, with random parameters that the caller seeds
    inputs  T → the module's arguments
    sites   MoE layers in it        trains  whether eager itself can differentiate it
    """

    name: str
    spelling: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    sites: int = 1
    trains: bool = True


def tokens(count: int) -> tuple[Tensor, ...]:
    """x[T, H]."""
    return (torch.randn(count, H, generator=torch.Generator().manual_seed(count)),)


def batches(count: int) -> tuple[Tensor, ...]:
    """x[2, T, H]."""
    return (torch.randn(2, count, H, generator=torch.Generator().manual_seed(count)),)


class Mlp(nn.Module):
    """Two layers with biases and GELU."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, WIDTH), nn.Linear(WIDTH, H)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Gated(nn.Module):
    """Gated, without biases."""

    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Linear(H, WIDTH, bias=False), nn.Linear(H, WIDTH, bias=False)
        self.w2 = nn.Linear(WIDTH, H, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Stacked(nn.Module):
    """All experts on rows[E, C, H], as batched products."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(E, H, WIDTH) * 0.2)
        self.w2 = nn.Parameter(torch.randn(E, WIDTH, H) * 0.2)

    def forward(self, x):
        return torch.bmm(F.relu(torch.bmm(x, self.w1)), self.w2)


class Listed(nn.Module):
    """All experts on rows[E, C, H], one module each."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def forward(self, x):
        return torch.cat([expert(rows) for rows, expert in zip(x.chunk(E, dim=0), self.experts, strict=True)])


class Routed(nn.Module):
    """A softmax router over what `experts` builds."""

    experts_of: Callable[[], nn.Module] = Stacked

    def __init__(self, factor=1.0):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.experts = self.experts_of()
        self.factor = factor

    def choose(self, x):
        """Renormalised weights[T, k] and experts[T, k]."""
        w, chosen = F.softmax(self.router(x), dim=-1).topk(K, dim=-1)
        return w / w.sum(-1, keepdim=True), chosen


@torch.library.custom_op("moec_spellings::groups", mutates_args=())
def groups(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Rows up to ends[e] times w[e]: a library's own grouped product, in any dtype."""
    starts = [0, *ends.tolist()[:-1]]
    return torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(zip(starts, ends.tolist(), strict=True))])


@groups.register_fake
def _(x, w, ends):
    return x.new_empty(x.shape[0], w.shape[2])


def _groups_backward(ctx, grad):
    x, w, ends = ctx.saved_tensors
    stops = ends.tolist()
    spans = list(enumerate(zip([0, *stops[:-1]], stops, strict=True)))
    dx = torch.cat([grad[a:b] @ w[e].t() for e, (a, b) in spans])
    return dx, torch.stack([x[a:b].t() @ grad[a:b] for e, (a, b) in spans]), None


groups.register_autograd(_groups_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
