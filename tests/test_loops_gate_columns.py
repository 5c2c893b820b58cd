"""Loops whose experts run on every token, weighted by their column of gates, where some token chose them."""

from __future__ import annotations

import pytest
import torch
from spelling import E, H
from spellings_strangers import Chosen
from test_spellings_more import (
    assert_close,
    assert_fused_at_any_size,
    assert_fused_in_training,
    assert_not_fused,
    assert_same_call,
    compiled,
    gradients,
)


class Gated(Chosen):
    """Gates of all experts, zero for those that were not chosen."""

    def gates(self, x):
        w, ids = self.choose(x)
        return torch.zeros(*x.shape[:-1], E).scatter(-1, ids, w), ids


class AsksTheGates(Gated):
    def forward(self, x):
        g, _ = self.gates(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if (g[..., e] > 0).any():
                y = y + g[..., e : e + 1] * expert(x)
        return y


class AsksTheirSum(Gated):
    def forward(self, x):
        g, _ = self.gates(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = g[..., e].unsqueeze(-1)
            if mine.sum() > 0:
                y += mine * expert(x)
        return y


class AsksTheChoice(Gated):
    def forward(self, x):
        g, ids = self.gates(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if not (ids == e).any():
                continue
            y += expert(x) * g[..., e].unsqueeze(-1)
        return y


class SoftmaxOfTheChosen(AsksTheChoice):
    """Gates are a softmax over the chosen experts' scores, −∞ elsewhere."""

    def gates(self, x):
        top, ids = self.router(x).topk(2, dim=-1)
        scores = torch.full((*x.shape[:-1], E), float("-inf")).scatter(-1, ids, top)
        return scores.softmax(-1), ids


class MaskAndGates(Gated):
    """What is added is multiplied by a column of the mask, which is asked, and by one of the gates."""

    def masked(self, x):
        p = self.router(x).softmax(-1)
        mask = torch.zeros_like(p).scatter(-1, p.topk(2, dim=-1).indices, 1.0)
        return p * mask / (p * mask).sum(-1, keepdim=True), mask

    def forward(self, x):
        p, mask = self.masked(x)
        y = torch.zeros_like(x)
        for e in range(E):
            chosen, gate = mask[..., e : e + 1], p[..., e : e + 1]
            if (chosen > 0).any():
                y = y + self.experts[e](x) * gate * chosen
        return y


FUSED = (MaskAndGates, AsksTheGates, AsksTheirSum, AsksTheChoice, SoftmaxOfTheChosen)


@pytest.mark.parametrize("spelling", FUSED, ids=lambda s: s.__name__)
def test_one_graph_fused_and_equal(spelling):
    torch.manual_seed(0)
    assert_fused_at_any_size(spelling(), H)


@pytest.mark.parametrize("spelling", FUSED, ids=lambda s: s.__name__)
def test_gradients(spelling):
    torch.manual_seed(0)
    assert_fused_in_training(spelling(), H, (13, 1))


def test_tokens_on_two_axes():
    torch.manual_seed(0)
    module = AsksTheirSum()
    run, report = compiled(module, dynamic=True)
    for count in (13, 7):
        x = torch.randn(2, count, H)
        assert_same_call(run, module, (x,))
        assert_close(gradients(run, module, (x,)), gradients(module, module, (x,)), 1e-4)
    assert {s.status for s in report.sites} == {"fused"}, report


class AsksForPositive(AsksTheGates):
    """Gates may be below 0, and an expert of such alone is passed over."""

    def gates(self, x):
        w, ids = self.router(x).topk(2, dim=-1)
        return torch.zeros(*x.shape[:-1], E).scatter(-1, ids, w), ids


class GatesOfAll(AsksTheChoice):
    """The gates of those that were not chosen are not zero."""

    def gates(self, x):
        _, ids = self.choose(x)
        return self.router(x).softmax(-1), ids


class FilledWithHalves(AsksTheChoice):
    def gates(self, x):
        w, ids = self.choose(x)
        return torch.full((*x.shape[:-1], E), 0.5).scatter(-1, ids, w), ids


class GatesOfTheNext(AsksTheChoice):
    """An expert that nobody chose is passed over, yet has gates: those of the expert before it."""

    def gates(self, x):
        w, ids = self.choose(x)
        return torch.zeros(*x.shape[:-1], E).scatter(-1, (ids + 1) % E, w), ids


class HalfAMask(MaskAndGates):
    """The mask holds halves, which count."""

    def masked(self, x):
        p = self.router(x).softmax(-1)
        mask = torch.zeros_like(p).scatter(-1, p.topk(2, dim=-1).indices, 0.5)
        return p * mask, mask


class AnotherMask(MaskAndGates):
    """The mask that is asked is of other choices than the gates'."""

    def masked(self, x):
        p, _ = super().masked(x)
        return p, torch.zeros_like(p).scatter(-1, self.router(x.flip(0)).topk(2, dim=-1).indices, 1.0)


LEFT = (HalfAMask, AnotherMask, AsksForPositive, GatesOfAll, FilledWithHalves, GatesOfTheNext)


@pytest.mark.parametrize("near", LEFT, ids=lambda s: s.__name__)
def test_near_miss_is_right_and_not_fused(near):
    torch.manual_seed(0)
    module = near()
    with torch.no_grad():
        module.router.weight[0] = -1.0  # the first expert is chosen seldom
    report = assert_not_fused(module, H, trained=True)
    assert any(not c.held for site in report.near_misses for c in site.checks), report
