"""Loops over experts that are kept by name, in a dictionary whose names are no numbers."""

from __future__ import annotations

import pytest
import torch
from spelling import E, H, Mlp
from test_loops_apart import Chosen
from test_spellings_more import assert_fused_at_any_size, assert_same_call, compiled
from torch import nn

NAMES = ("math", "code", "chat", "misc")[:E]


class Named(Chosen):
    def __init__(self):
        super().__init__()
        self.names = list(NAMES)
        self.experts = nn.ModuleDict({name: Mlp() for name in self.names})

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for i, name in enumerate(self.names):
            t, s = torch.where(chosen == i)
            if len(t) == 0:
                continue
            y.index_add_(0, t, self.experts[name](x[t]) * w[t, s].unsqueeze(1))
        return y


class Items(Named):
    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for i, (_name, expert) in enumerate(self.experts.items()):
            t, s = torch.where(chosen == i)
            y.index_add_(0, t, expert(x[t]) * w[t, s].unsqueeze(1))
        return y


@pytest.mark.parametrize("kind", [Named, Items], ids=lambda k: k.__name__)
def test_fused_and_equal(kind):
    torch.manual_seed(0)
    assert_fused_at_any_size(kind(), H)


class Compared(Named):
    """One of the names means something besides."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for i, name in enumerate(self.names):
            t, s = torch.where(chosen == i)
            rows = self.experts[name](x[t])
            scale = 2.0 if name == "code" else 1.0
            y.index_add_(0, t, scale * rows * w[t, s].unsqueeze(1))
        return y


class OtherOrder(Named):
    """The names are in another order than the dictionary's."""

    def __init__(self):
        super().__init__()
        self.names = list(reversed(NAMES))


@pytest.mark.parametrize("kind", [Compared, OtherOrder], ids=lambda k: k.__name__)
def test_what_names_mean_is_kept(kind):
    torch.manual_seed(0)
    module = kind()
    run, _ = compiled(module)
    with torch.no_grad():
        for count in (13, 1):
            assert_same_call(run, module, (torch.randn(count, H),))
