"""Loops that read back the rows that they have just written, to weight them."""

from __future__ import annotations

import pytest
import torch
from spelling import H
from spellings_strangers import Chosen, ChosenOnce
from test_spellings_more import (
    assert_fused_at_any_size,
    assert_fused_in_training,
    assert_not_fused,
)


class WeightedBehind(ChosenOnce):
    def forward(self, x):
        p, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            m = ids == e
            if m.any():
                y[m] = expert(x[m])
                y[m] = y[m] * p[m].unsqueeze(-1)
        return y


class WeightedInPlace(ChosenOnce):
    def forward(self, x):
        p, ids = self.choose(x)
        y = torch.empty_like(x)
        for e, expert in enumerate(self.experts):
            m = ids == e
            y[m] = expert(x[m])
            y[m] *= p[m].unsqueeze(-1)
        return y


class ByPlaces(ChosenOnce):
    def forward(self, x):
        p, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t = torch.nonzero(ids == e).squeeze(-1)
            if t.numel() == 0:
                continue
            y[t] = expert(x[t])
            y[t] *= p[t, None]
        return y


FUSED = (WeightedBehind, WeightedInPlace, ByPlaces)


@pytest.mark.parametrize("spelling", FUSED, ids=lambda s: s.__name__)
def test_one_graph_fused_and_equal(spelling):
    torch.manual_seed(0)
    assert_fused_at_any_size(spelling(), H)


@pytest.mark.parametrize("spelling", FUSED, ids=lambda s: s.__name__)
def test_gradients(spelling):
    torch.manual_seed(0)
    assert_fused_in_training(spelling(), H)


class OtherRows(ChosenOnce):
    """What is read back are the rows of the next expert too."""

    def forward(self, x):
        p, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            m, wider = ids == e, ids >= e
            y[m] = expert(x[m])
            y[wider] = y[wider] * p[wider].unsqueeze(-1) + 1.0
        return y


class TokensTwice(Chosen):
    """Rows by places of pairs: a token that chose an expert twice is written twice."""

    def choose(self, x):
        scores = self.router(x)
        ids = torch.stack([scores.argmax(-1), (scores * scores).argmax(-1)], dim=1)
        return torch.rand(x.shape[0], 2, generator=torch.Generator().manual_seed(0)), ids

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, s = torch.where(ids == e)
            y[t] = expert(x[t]) * w[t, s, None]
            y[t] = y[t] * w[t, s, None]
        return y


class TwoExperts(Chosen):
    """A token's second expert writes over the first one's row."""

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            m = (ids == e).any(-1)
            y[m] = expert(x[m])
            y[m] = y[m] * w[m].sum(-1, keepdim=True)
        return y


@pytest.mark.parametrize("near", [OtherRows, TokensTwice, TwoExperts], ids=lambda s: s.__name__)
def test_near_miss_is_right_and_not_fused(near):
    torch.manual_seed(0)
    assert_not_fused(near(), H)
