"""Loops that keep rows by masks in a list, and their places in another: joined, the rows are put back by the places."""

from __future__ import annotations

import pytest
import torch
from spelling import E, H, K
from spellings_strangers import Chosen, ChosenOnce
from test_spellings_more import (
    assert_fused_at_any_size,
    assert_fused_in_training,
    assert_same_call,
    compiled,
)


class PutAtPlaces(Chosen):
    experts_run = E

    def pairs(self, x):
        w, ids = self.choose(x)
        return w, ids.flatten()

    def forward(self, x):
        w, flat = self.pairs(x)
        parts, places = [], []
        for e in range(self.experts_run):
            mine = (flat == e).nonzero().squeeze(-1)
            parts.append(self.experts[e](x[mine // K]))
            places.append(mine)
        y = x.new_zeros(x.shape[0] * K, H)
        y[torch.cat(places)] = torch.cat(parts)
        return (y.view(-1, K, H) * w.unsqueeze(-1)).sum(1)


class TakenByOrder(Chosen):
    def forward(self, x):
        w, ids = self.choose(x)
        flat = ids.view(-1)
        parts, places = [], []
        for e, expert in enumerate(self.experts):
            mine = torch.where(flat == e)[0]
            if mine.numel() == 0:
                continue
            parts.append(expert(x[mine // K]))
            places.append(mine)
        rows = torch.cat(parts)[torch.argsort(torch.cat(places))]
        return (rows.view(-1, K, H) * w.unsqueeze(-1)).sum(1)


class OneEach(ChosenOnce):
    """One expert a token: what comes back is the layer's result."""

    def forward(self, x):
        p, ids = self.choose(x)
        parts, places = [], []
        for e, expert in enumerate(self.experts):
            mine = ids == e
            parts.append(expert(x[mine]) * p[mine].unsqueeze(-1))
            places.append(mine.nonzero().squeeze(1))
        return torch.cat(parts)[torch.cat(places).argsort()]


FUSED = (PutAtPlaces, OneEach)


@pytest.mark.parametrize("kind", FUSED, ids=lambda k: k.__name__)
def test_fused_and_equal(kind):
    torch.manual_seed(0)
    assert_fused_at_any_size(kind(), H)


@pytest.mark.parametrize("kind", [*FUSED, TakenByOrder], ids=lambda k: k.__name__)
def test_gradients(kind):
    torch.manual_seed(0)
    assert_fused_in_training(kind(), H, (13, 7))


class DroppedInPlace(PutAtPlaces):
    """Numbers of a top-k that are written over: not each of them is an expert's."""

    def pairs(self, x):
        w, ids = self.choose(x)
        ids[w < 0.55] = -1
        return w, ids.flatten()


class DroppedByAView(PutAtPlaces):
    def pairs(self, x):
        w, ids = self.choose(x)
        flat = ids.flatten()
        flat.masked_fill_(w.flatten() < 0.55, -1)
        return w, flat


class Dropped(PutAtPlaces):
    def pairs(self, x):
        w, ids = self.choose(x)
        return w, ids.masked_fill(w < 0.55, E).flatten()


class LastHasNoTurn(PutAtPlaces):
    experts_run = E - 1


class OneIsPassedOver(PutAtPlaces):
    def forward(self, x):
        w, flat = self.pairs(x)
        parts, places = [], []
        for e in range(E):
            mine = (flat == e).nonzero().squeeze(-1)
            if len(mine) == 0:
                continue
            if (flat == 1).sum() > 8 * e + 3:
                continue
            parts.append(self.experts[e](x[mine // K]))
            places.append(mine)
        y = x.new_zeros(x.shape[0] * K, H)
        y[torch.cat(places)] = torch.cat(parts)
        return (y.view(-1, K, H) * w.unsqueeze(-1)).sum(1)


class PutElsewhere(PutAtPlaces):
    """Rows come back in the order of other places."""

    def forward(self, x):
        w, flat = self.pairs(x)
        parts, places = [], []
        for e in range(E):
            mine = torch.where(flat == e)[0]
            parts.append(self.experts[e](x[mine // K]))
            places.append(mine)
        rows = torch.cat(parts)[torch.cat(places)]
        return (rows.view(-1, K, H) * w.unsqueeze(-1)).sum(1)


NEAR = (DroppedInPlace, DroppedByAView, Dropped, LastHasNoTurn, OneIsPassedOver, PutElsewhere)


@pytest.mark.parametrize("kind", NEAR, ids=lambda k: k.__name__)
def test_near_misses_compute_what_they_did(kind):
    torch.manual_seed(0)
    module = kind()
    run, _ = compiled(module, dynamic=True)
    with torch.no_grad():
        for count in (13, 40):
            assert_same_call(run, module, (torch.randn(count, H),))
