"""Loops that keep a number for each expert, or look one up and move it to the host."""

from __future__ import annotations

import pytest
import torch
from spelling import E, H, K
from spellings_strangers import Chosen
from test_spellings_more import assert_fused_at_any_size, assert_fused_in_training


class LoadsAreFloats(Chosen):
    """Counts, whole numbers, are stored into floats that a buffer is moved by."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.zeros(E))

    def forward(self, x):
        w, ids = self.choose(x)
        y, load = torch.zeros_like(x), torch.zeros(E)
        for e in range(E):
            mask = ids == e
            load[e] = mask.sum()
            rows = mask.any(-1)
            if not rows.any():
                continue
            y[rows] += self.experts[e](x[rows]) * (w * mask).sum(-1)[rows].unsqueeze(-1)
        with torch.no_grad():
            self.bias += 0.1 * torch.sign(load.mean() - load)
        return y


class OneByOne(Chosen):
    """Rows in expert order are cut by numbers that are moved to the host one by one."""

    def forward(self, x):
        w, ids = self.choose(x)
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        tokens = torch.arange(x.shape[0]).repeat_interleave(K)[order]
        gates = w.reshape(-1)[order]
        counts = torch.bincount(flat, minlength=E)
        starts = torch.cumsum(counts, dim=0) - counts
        y = torch.zeros_like(x)
        for e in range(E):
            start, size = int(starts[e].item()), int(counts[e].item())
            if size == 0:
                continue
            mine = tokens[start : start + size]
            y.index_add_(0, mine, self.experts[e](x[mine]) * gates[start : start + size].unsqueeze(-1))
        return y


@pytest.mark.parametrize("kind", [LoadsAreFloats, OneByOne], ids=lambda k: k.__name__)
def test_fused_and_equal(kind):
    torch.manual_seed(0)
    assert_fused_at_any_size(kind(), H)
    assert_fused_in_training(kind(), H, (13,))
