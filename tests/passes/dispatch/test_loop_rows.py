"""Loops whose rows, orders or skips are not what they seem: declined, never rewritten into something else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moec

QUICK = {"rest": "eager"}
H, E, K = 16, 4, 2


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 8), nn.SiLU(), nn.Linear(8, H)) for _ in range(E))

    def route(self, x):
        return torch.topk(F.softmax(self.gate(x), -1), K, dim=-1)


class SkipsAnExpertAfterItsRows(Base):
    def forward(self, x):
        w, c = self.route(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, s = torch.where(c == e)
            if e == 2:
                continue
            y.index_add_(0, t, expert(x[t]) * w[t, s, None])
        return y


class SkipsOnAnotherSize(Base):
    def forward(self, x):
        w, c = self.route(x)
        y = torch.zeros_like(x)
        others = torch.where(c[:, 0] == 99)[0]
        for e, expert in enumerate(self.experts):
            t, s = torch.where(c == e)
            if others.numel() == 0:
                continue
            y.index_add_(0, t, expert(x[t]) * w[t, s, None])
        return y


class WeightsInAnotherOrder(Base):
    def forward(self, x):
        w, c = self.route(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, _ = torch.where(c == e)
            s2, t2 = torch.where((c == e).t())
            y.index_add_(0, t, expert(x[t]) * w[t2, s2, None])
        return y


class WritesInAnotherOrder(Base):
    def forward(self, x):
        w, c = self.route(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            s, t = torch.where((c == e).t())
            mask = (c == e).any(-1)
            y[mask] += expert(x[t]) * w[t, s, None]
        return y


MUTANTS = (SkipsAnExpertAfterItsRows, SkipsOnAnotherSize, WeightsInAnotherOrder, WritesInAnotherOrder)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_not_fused_and_equal(mutant):
    layer, x = mutant(), torch.randn(13, H)
    with torch.no_grad():
        report = moec.explain(layer, x, moec_options=QUICK)
        got = torch.compile(layer, backend="moec", options=QUICK)(x)
    assert not [s for s in report.sites if s.status == "fused"]
    torch.testing.assert_close(got, layer(x))
