"""Loops whose body, or a part of it with branches of its own, stands in a method or a function."""

from __future__ import annotations

import pytest
import torch
from spelling import E, H
from test_loops_apart import Chosen
from test_spellings_more import assert_close, assert_fused_at_any_size, assert_same_call, compiled, gradients


def add_rows(number, x, chosen, w, experts, y):
    rows, slots = torch.where(chosen == number)
    if rows.shape[0] > 0:
        y.index_add_(0, rows, w[rows, slots, None] * experts[number](x[rows]))


class WholeBody(Chosen):
    """A method holds the whole of the body, and returns early where an expert is idle."""

    def run_expert(self, e, x, w, chosen, y):
        t, s = torch.where(chosen == e)
        if t.numel() == 0:
            return
        y.index_add_(0, t, self.experts[e](x[t]) * w[t, s].unsqueeze(-1))

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            self.run_expert(e, x, w, chosen, y)
        return y


class FunctionBody(Chosen):
    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            add_rows(e, x, chosen, w, self.experts, y)
        return y


class Branches(Chosen):
    """A method with branches on what is no tensor, a default, and a return on each side."""

    doubled, power = False, 1.0

    def run_expert(self, number, rows, scale=1.0):
        """Some steps."""
        if self.doubled:
            return self.experts[number](rows) * 2.0
        rows = self.experts[number](rows)
        if self.power != 1.0:
            rows = rows**self.power
        return rows * scale

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            t, s = torch.where(chosen == e)
            if t.numel() == 0:
                continue
            y[t] += self.run_expert(e, x[t], scale=0.5) * w[t, s].unsqueeze(-1)
        return y


class HelperOfHelper(Chosen):
    """A method selects rows by another one, and hands them on."""

    def mine(self, e, chosen):
        return torch.where(chosen == e)

    def rows_of(self, e, x, chosen):
        t, s = self.mine(e, chosen)
        return t, s, x[t]

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            t, s, rows = self.rows_of(e, x, chosen)
            if len(t) == 0:
                continue
            y.index_add_(0, t, self.experts[e](rows) * w[t, s, None])
        return y


FUSED = (WholeBody, FunctionBody, Branches, HelperOfHelper)


@pytest.mark.parametrize("kind", FUSED, ids=lambda k: k.__name__)
def test_fused_and_equal(kind):
    torch.manual_seed(0)
    assert_fused_at_any_size(kind(), H)


def test_gradients():
    torch.manual_seed(0)
    module = WholeBody()
    run, _ = compiled(module)
    x = (torch.randn(13, H),)
    assert_close(gradients(run, module, x), gradients(module, module, x), 1e-4)


class OverriddenBody(WholeBody):
    def run_expert(self, e, x, w, chosen, y):
        super().run_expert(e, 2 * x, w, chosen, y)


class GoesOnAfterwards(WholeBody):
    """What follows the call happens for idle experts too."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y, seen = torch.zeros_like(x), torch.zeros(E)
        for e in range(E):
            self.run_expert(e, x, w, chosen, y)
            seen[e] += 1.0
        return y * seen.sum()


SCALE = 3.0


class NameOfTheFile(WholeBody):
    """The method reads a name of the file that the loop's own function uses for something else."""

    def scaled(self, e, rows):
        return self.experts[e](rows) * SCALE

    def forward(self, x):
        SCALE = 1.0
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            t, s = torch.where(chosen == e)
            y.index_add_(0, t, SCALE * self.scaled(e, x[t]) * w[t, s].unsqueeze(-1))
        return y


class ReturnsOthers(WholeBody):
    """What is returned for an idle expert is added, and is no zero."""

    def run_expert(self, e, x, w, chosen):
        t, s = torch.where(chosen == e)
        if t.numel() == 0:
            return torch.ones_like(x)
        return torch.zeros_like(x).index_add(0, t, self.experts[e](x[t]) * w[t, s].unsqueeze(-1))

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            y = y + self.run_expert(e, x, w, chosen)
        return y


@pytest.mark.parametrize(
    "kind", [OverriddenBody, GoesOnAfterwards, NameOfTheFile, ReturnsOthers], ids=lambda k: k.__name__
)
def test_near_misses_compute_what_they_did(kind):
    torch.manual_seed(0)
    module = kind()
    run, _ = compiled(module)
    with torch.no_grad():
        for count in (13, 1):
            assert_same_call(run, module, (torch.randn(count, H),))


def test_a_helper_of_the_file_that_was_exchanged(monkeypatch):
    """The loop asks for the function that was written out, by its code."""
    torch.manual_seed(0)
    module = FunctionBody()
    monkeypatch.setitem(globals(), "add_rows", lambda number, x, chosen, w, experts, y: y.add_(number))
    run, _ = compiled(module)
    with torch.no_grad():
        x = torch.randn(13, H)
        torch.testing.assert_close(run(x), torch.full_like(x, sum(range(E))))
