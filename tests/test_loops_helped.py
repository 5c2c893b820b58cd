"""Loops whose rows or experts are found elsewhere: lists made before the loop, methods that are handed its item."""

from __future__ import annotations

import pytest
import torch
from spelling import E, H
from test_loops_apart import Chosen
from test_spellings_more import assert_close, assert_same_call, compiled, gradients


class ListedRows(Chosen):
    def forward(self, x):
        w, chosen = self.choose(x)
        rows = [torch.where(chosen == j) for j in range(E)]
        y = torch.zeros_like(x)
        for e, (t, s) in enumerate(rows):
            if len(t) == 0:
                continue
            y[t] += w[t, s].unsqueeze(1) * self.experts[e](x[t])
        return y


class ListedRowsAndGates(Chosen):
    def forward(self, x):
        w, chosen = self.choose(x)
        rows = [(chosen == j).any(-1).nonzero().flatten() for j in range(E)]
        gates = [(w * (chosen == j)).sum(-1) for j in range(E)]
        y = torch.zeros_like(x)
        for e in range(E):
            t = rows[e]
            y.index_add_(0, t, self.experts[e](x[t]) * gates[e][t].unsqueeze(-1))
        return y


class ZippedRows(Chosen):
    def forward(self, x):
        w, chosen = self.choose(x)
        rows = [(chosen == j).nonzero(as_tuple=True) for j in range(E)]
        y = torch.zeros_like(x)
        for expert, (t, s) in zip(self.experts, rows, strict=False):
            y.index_add_(0, t, expert(x[t]) * w[t, s].unsqueeze(-1))
        return y


class PlacesTurned(Chosen):
    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, s = (chosen == e).nonzero().T
            y[t] += expert(x[t]) * w[t, s].unsqueeze(-1)
        return y


class Helped(Chosen):
    def run_expert(self, number, rows):
        return self.experts[number](rows)

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            t, s = torch.where(chosen == e)
            if t.numel() == 0:
                continue
            y[t] += self.run_expert(e, x[t]) * w[t, s, None]
        return y


class HelpedInSteps(Chosen):
    def weighted(self, number, rows, weights):
        """Some steps."""
        expert = self.experts[number]
        rows = expert(rows)
        return rows * weights

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            t, s = torch.where(chosen == e)
            out = self.weighted(number=e, rows=x[t], weights=w[t, s, None])
            y.index_add_(0, t, out)
        return y


class CountedByHand(Chosen):
    def forward(self, x):
        w, chosen = self.choose(x)
        y, e = torch.zeros_like(x), 0
        while e < len(self.experts):
            t, s = torch.where(chosen == e)
            if t.numel():
                y.index_add_(0, t, self.experts[e](x[t]) * w[t, s, None])
            e += 1
        return y


FUSED = (ListedRows, ListedRowsAndGates, ZippedRows, PlacesTurned, Helped, HelpedInSteps, CountedByHand)


@pytest.mark.parametrize("kind", FUSED, ids=lambda k: k.__name__)
def test_fused_and_equal(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module, dynamic=True)
    with torch.no_grad():
        for count in (13, 7):
            assert_same_call(run, module, (torch.randn(count, H),))
        assert [s.status for s in report.sites] == ["fused"], report
        assert report.graphs == 1
        assert_same_call(run, module, (torch.randn(0, H),))


@pytest.mark.parametrize("kind", [ListedRows, Helped], ids=lambda k: k.__name__)
def test_gradients(kind):
    torch.manual_seed(0)
    module = kind()
    run, _ = compiled(module)
    x = (torch.randn(13, H),)
    assert_close(gradients(run, module, x), gradients(module, module, x), 1e-4)


class Overridden(Helped):
    def run_expert(self, number, rows):
        return self.experts[number](rows) * 2


class StopsEarly(CountedByHand):
    """The number that it counts is set in the body too."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y, e = torch.zeros_like(x), 0
        while e < E:
            t, s = torch.where(chosen == e)
            y.index_add_(0, t, self.experts[e](x[t]) * w[t, s, None])
            e = e + 1 if e == 0 else e
            e += 1
        return y


class RowsOfBefore(Chosen):
    """The list holds rows as they were before the loop changed them."""

    def forward(self, x):
        _, chosen = self.choose(x)
        x = x.clone()
        rows = [x[(chosen == j).any(-1)] for j in range(E)]
        for e in range(E):
            mine = (chosen == e).any(-1)
            x[mine] = x[mine] + self.experts[e](rows[e])
        return x


class RouterBoundAnew(Chosen):
    def forward(self, x):
        w, chosen = self.choose(x)
        rows = [torch.where(chosen == j) for j in range(E)]
        chosen = chosen.flip(0)
        y = torch.zeros_like(x)
        for e, (t, s) in enumerate(rows):
            y[t] += w[t, s].unsqueeze(1) * self.experts[e](x[t])
        return y + chosen.sum()


class FewerRowsThanExperts(ZippedRows):
    def forward(self, x):
        w, chosen = self.choose(x)
        rows = [torch.where(chosen == j) for j in range(E - 1)]
        y = torch.zeros_like(x)
        for expert, (t, s) in zip(self.experts, rows, strict=False):
            y.index_add_(0, t, expert(x[t]) * w[t, s].unsqueeze(-1))
        return y


@pytest.mark.parametrize(
    "kind", [Overridden, StopsEarly, RowsOfBefore, RouterBoundAnew, FewerRowsThanExperts], ids=lambda k: k.__name__
)
def test_near_misses_compute_what_they_did(kind):
    torch.manual_seed(0)
    module = kind()
    run, _ = compiled(module)
    with torch.no_grad():
        assert_same_call(run, module, (torch.randn(13, H),))
