"""Models inside DistributedDataParallel: Dynamo's cuts at buckets of gradients part no layer of experts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from compiling import compiled
from torch import nn
from torch.nn.parallel import DistributedDataParallel

H, WIDTH, E = 16, 24, 4


class Looped(nn.Module):
    """A loop over stacked experts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, WIDTH, H) * H**-0.5)
        self.down = nn.Parameter(torch.randn(E, H, WIDTH) * WIDTH**-0.5)

    def chosen(self, x):
        return self.gate(x).softmax(-1).topk(2, -1)

    def forward(self, x):
        weights, chosen = self.chosen(x)
        y = torch.zeros_like(x)
        for e in range(len(self.up)):
            token, slot = torch.where(chosen == e)
            y.index_add_(0, token, (x[token] @ self.up[e].T).relu() @ self.down[e].T * weights[token, slot, None])
        return y


class Gathered(Looped):
    """The weights of each token's experts, gathered."""

    def forward(self, x):
        weights, chosen = self.chosen(x)
        h = torch.einsum("th,tkfh->tkf", x, self.up[chosen]).relu()
        return torch.einsum("tkf,tkhf,tk->th", h, self.down[chosen], weights)


class Stack(nn.Module):
    """Layers one after the other; Dynamo does not compile torch's own Sequential where it begins at one."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, WIDTH), nn.Linear(WIDTH, H)

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.fixture
def small_buckets(monkeypatch):
    """A group of one rank, and buckets so small that nearly every parameter fills one."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 256)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield 512 / 2**20
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", [Looped, Gathered])
def test_layers_are_whole_where_buckets_would_cut_them(small_buckets, kind):
    model = Stack(nn.Linear(H, H), kind(), nn.LayerNorm(H), kind())
    eager, x = copy.deepcopy(model), torch.randn(13, H)
    call, report = compiled(DistributedDataParallel(model, bucket_cap_mb=small_buckets))
    got, want = call(x), eager(x)
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    for mine, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert [site.status for site in report.sites] == ["fused", "fused"]
    assert len(report.graph_reports) == 1


def test_a_graph_without_experts_is_cut_as_ever(small_buckets):
    model = Stack(Plain(), Plain())
    x = torch.randn(13, H)
    call, report = compiled(DistributedDataParallel(model, bucket_cap_mb=small_buckets))
    torch.testing.assert_close(call(x), model(x))
    assert len(report.graph_reports) > 1
