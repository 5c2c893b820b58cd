"""Loops whose `if` chain gives some experts another body: a null expert at the end, several that hand on or drop."""

from __future__ import annotations

import pytest
import torch
from spelling import E, H
from spellings_strangers import Chosen
from test_spellings_more import (
    assert_fused_at_any_size,
    assert_fused_in_training,
    assert_not_fused,
    assert_same_call,
    compiled,
)
from torch import nn


class NullAtTheEnd(Chosen):
    """The last expert hands on what it is given."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(self.experts[:-1])

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            t, s = torch.where(ids == e)
            if e == E - 1:
                y[t] += w[t, s, None] * x[t]
            else:
                y[t] += w[t, s, None] * self.experts[e](x[t])
        return y


class DroppedAtTheEnd(NullAtTheEnd):
    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            if e == E - 1:
                continue
            t, s = torch.where(ids == e)
            if len(t) == 0:
                continue
            y[t] += w[t, s, None] * self.experts[e](x[t])
        return y


class ThreeBodies(Chosen):
    """The first experts are MLPs, one hands on, one gives zeros; what each gives is added behind the chain."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E + 2, bias=False)

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E + 2):
            t, s = torch.where(ids == e)
            if t.numel() == 0:
                continue
            if e < E:
                rows = self.experts[e](x[t])
            elif e == E:
                rows = x[t]
            else:
                rows = torch.zeros_like(x[t])
            y.index_add_(0, t, w[t, s, None] * rows)
        return y


FUSED = (NullAtTheEnd, DroppedAtTheEnd, ThreeBodies)


@pytest.mark.parametrize("spelling", FUSED, ids=lambda s: s.__name__)
def test_one_graph_fused_and_equal(spelling):
    torch.manual_seed(0)
    assert_fused_at_any_size(spelling(), H)


@pytest.mark.parametrize("spelling", FUSED, ids=lambda s: s.__name__)
def test_gradients(spelling):
    torch.manual_seed(0)
    assert_fused_in_training(spelling(), H)


class NullInTheMiddle(Chosen):
    """An expert that has matrices is not run, since another body stands for it."""

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            t, s = torch.where(ids == e)
            if e == 1:
                y[t] += w[t, s, None] * x[t]
            else:
                y[t] += w[t, s, None] * self.experts[e](x[t])
        return y


class WritesOver(Chosen):
    """Rows are written over, so the order of experts matters."""

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            t, s = torch.where(ids == e)
            y[t] = x[t] if e == E - 1 else w[t, s, None] * self.experts[e](x[t])
        return y


@pytest.mark.parametrize("near", [NullInTheMiddle, WritesOver], ids=lambda s: s.__name__)
def test_near_miss_is_right_and_not_fused(near):
    torch.manual_seed(0)
    assert_not_fused(near(), H, trained=True)


class FiveBodies(Chosen):
    """Too many bodies for a loop each: it is traced as it is written."""

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, s = torch.where(ids == e)
            rows = x[t]
            if e < 1:
                rows = rows + 1
            if e < 2:
                rows = rows + 2
            if e < 3:
                rows = rows + 3
            y.index_add_(0, t, w[t, s, None] * expert(rows))
        return y


def test_many_bodies_are_right():
    torch.manual_seed(0)
    module = FiveBodies()
    run, report = compiled(module)
    assert_same_call(run, module, (torch.randn(13, H),))
    assert all(site.status != "fused" for site in report.sites), report
