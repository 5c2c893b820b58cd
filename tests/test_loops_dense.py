"""Loops whose experts run on every token, where some token chose them: what they add is gated, or put into zeros."""

from __future__ import annotations

import pytest
import torch
from spelling import E, H
from spellings_strangers import Chosen, ChosenOnce
from test_spellings_more import (
    assert_close,
    assert_fused_at_any_size,
    assert_fused_in_training,
    assert_not_fused,
    assert_same_call,
    compiled,
    gradients,
)
from torch import nn


class Asks(Chosen):
    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            mask = ids == e
            if mask.any():
                y += (w * mask).sum(-1, keepdim=True) * self.experts[e](x)
        return y


class AsksByNumber(Chosen):
    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).float()
            if mask.sum() == 0:
                continue
            y = y + expert(x) * torch.sum(w * mask, dim=1).unsqueeze(-1)
        return y


class AsksForMembers(Chosen):
    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if e not in ids:
                continue
            y = y + expert(x) * torch.where(ids == e, w, torch.zeros_like(w)).sum(-1, keepdim=True)
        return y


class RowsOfMembers(Chosen):
    def forward(self, x):
        w, ids = self.choose(x)
        used = ids.unique()
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if e in used:
                t, s = torch.where(ids == e)
                y.index_add_(0, t, expert(x[t]) * w[t, s, None])
        return y


class RunsOverTheChosen(Chosen):
    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e in ids.unique().tolist():
            y += self.experts[e](x) * (w * (ids == e)).sum(-1, keepdim=True)
        return y


class RowsOfASet(Chosen):
    def forward(self, x):
        w, ids = self.choose(x)
        used = set(ids.flatten().tolist())
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if e not in used:
                continue
            t, s = torch.where(ids == e)
            y.index_add_(0, t, expert(x[t]) * w[t, s, None])
        return y


class PutIntoZeros(Chosen):
    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            mine = mask.any(dim=-1)
            if mine.any():
                part = torch.zeros_like(x)
                part[mine] = expert(x[mine])
                y += part * (w * mask).sum(-1, keepdim=True)
        return y


class WeightedInZeros(Chosen):
    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (ids == e).any(-1)
            gate = (w * (ids == e)).sum(-1)
            part = torch.zeros_like(x)
            part[mine] = expert(x[mine]) * gate[mine].unsqueeze(-1)
            y = y + part
        return y


class TakenBack(Chosen):
    """Every token is run, and the rows of those that chose the expert are added."""

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (ids == e).any(-1)
            if mine.any():
                gate = (w * (ids == e)).sum(-1, keepdim=True)
                y[mine] += (gate * expert(x))[mine]
        return y


class TimesTheMask(ChosenOnce):
    def forward(self, x):
        p, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.any():
                y += mask.float().unsqueeze(-1) * expert(x) * p.unsqueeze(-1)
        return y


class MaskOfTheScore(ChosenOnce):
    def forward(self, x):
        p, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.any():
                y += (p * mask).unsqueeze(-1) * expert(x)
        return y


FUSED = (
    Asks,
    AsksByNumber,
    AsksForMembers,
    RowsOfMembers,
    RunsOverTheChosen,
    RowsOfASet,
    PutIntoZeros,
    WeightedInZeros,
    TakenBack,
    TimesTheMask,
    MaskOfTheScore,
)


@pytest.mark.parametrize("spelling", FUSED, ids=lambda s: s.__name__)
def test_one_graph_fused_and_equal(spelling):
    torch.manual_seed(0)
    assert_fused_at_any_size(spelling(), H)


@pytest.mark.parametrize("spelling", FUSED, ids=lambda s: s.__name__)
def test_gradients(spelling):
    torch.manual_seed(0)
    assert_fused_in_training(spelling(), H, (13, 1))


@pytest.mark.parametrize("spelling", [Asks, TakenBack, PutIntoZeros], ids=lambda s: s.__name__)
def test_tokens_on_two_axes(spelling):
    torch.manual_seed(0)
    module = spelling()
    run, report = compiled(module, dynamic=True)
    for count in (13, 7):
        x = torch.randn(2, count, H)
        assert_same_call(run, module, (x,))
        assert_close(gradients(run, module, (x,)), gradients(module, module, (x,)), 1e-4)
    assert {s.status for s in report.sites} == {"fused"}, report


class Normed(nn.Module):
    """An expert with code of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(H), nn.Linear(H, H)

    def forward(self, x):
        return self.out(self.norm(x))


@pytest.mark.parametrize("spelling", [Asks, TakenBack, PutIntoZeros, TimesTheMask], ids=lambda s: s.__name__)
def test_experts_with_code_of_their_own_are_right(spelling):
    torch.manual_seed(0)
    module = type("OwnCode", (spelling,), {"expert": Normed})()
    run, _ = compiled(module, dynamic=True)
    for count in (13, 7):
        x = torch.randn(count, H)
        assert_same_call(run, module, (x,))
        assert_close(gradients(run, module, (x,)), gradients(module, module, (x,)), 1e-4)


class NotWeightedByTheMask(Chosen):
    """An expert that anybody chose runs for all."""

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if (ids == e).any():
                y += w.sum(-1, keepdim=True) * expert(x)
        return y


class AddedBesideTheMask(Chosen):
    """What is added is not zero where the expert was not chosen."""

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.any():
                y += (w * mask).sum(-1, keepdim=True) * expert(x) + 1.0
        return y


class AsksOthers(Chosen):
    """An expert is passed over where others than those that it serves chose it."""

    def forward(self, x):
        w, ids = self.choose(x)
        first = self.router(x.flip(0)).argmax(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if (first == e).any():
                y += (w * (ids == e)).sum(-1, keepdim=True) * expert(x)
        return y


class PutIntoOnes(Chosen):
    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (ids == e).any(-1)
            part = torch.ones_like(x)
            part[mine] = expert(x[mine])
            y += part * (w * (ids == e)).sum(-1, keepdim=True) + part
        return y


class OneWeightForTwo(Chosen):
    """The weight of a token's first choice, whichever the expert is."""

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (ids == e).any(-1)
            part = torch.zeros_like(x)
            part[mine] = expert(x[mine])
            y = y + part * w[:, :1]
        return y


class LastExpertStays(Chosen):
    """Rows are written over by a token's later expert, and added behind the loop."""

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (ids == e).any(-1)
            y[mine] = expert(x[mine]) * (w * (ids == e)).sum(-1)[mine].unsqueeze(-1)
        return x + y


class ReadsTheSum(Chosen):
    def forward(self, x):
        w, ids = self.choose(x)
        y = x.clone()
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.any():
                y = y + (w * mask).sum(-1, keepdim=True) * expert(y)
        return y


class MeetsTheNext(Chosen):
    """The mask is of another expert than the one that runs."""

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == (e + 1) % E
            if mask.any():
                y += (w * mask).sum(-1, keepdim=True) * expert(x)
        return y


LEFT = (
    NotWeightedByTheMask,
    AddedBesideTheMask,
    AsksOthers,
    PutIntoOnes,
    OneWeightForTwo,
    LastExpertStays,
    ReadsTheSum,
    MeetsTheNext,
)

BROKEN = (ReadsTheSum, MeetsTheNext)
"""Loops that are traced as they are written, which breaks the graph."""


@pytest.mark.parametrize("near", LEFT, ids=lambda s: s.__name__)
def test_near_miss_is_right_and_not_fused(near):
    torch.manual_seed(0)
    module = near()
    report = assert_not_fused(module, H)
    if near not in BROKEN:
        assert any(not c.held for site in report.near_misses for c in site.checks), report
    x = (torch.randn(13, H),)
    run, _ = compiled(module)
    assert_close(gradients(run, module, x), gradients(module, module, x), 1e-4)
