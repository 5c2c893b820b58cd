"""Loops over experts that go through the slots inside: rows cut again, weights filled in, rows selected by weights."""

from __future__ import annotations

import pytest
import torch
from spelling import E, H, K
from test_loops_apart import Chosen
from test_spellings_more import assert_close, assert_fused_at_any_size, assert_same_call, compiled, gradients


class RowsCutAgain(Chosen):
    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            mine = (chosen == e).any(dim=-1)
            if mine.any():
                rows = self.experts[e](x[mine])
                for k in range(K):
                    here = chosen[:, k] == e
                    if here.any():
                        y[here] += w[here, k].unsqueeze(-1) * rows[here[mine]]
        return y


class RowsCutByBoth(Chosen):
    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (chosen == e).any(dim=1)
            if mine.sum() == 0:
                continue
            rows = expert(x[mine])
            for k in range(chosen.shape[1]):
                here = mine & (chosen[:, k] == e)
                if here.sum() > 0:
                    at = torch.where(here)[0]
                    y.index_add_(0, at, w[at, k].unsqueeze(-1) * rows[here[mine]])
        return y


class WeightsBySlot(Chosen):
    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (chosen == e).any(-1)
            if not mine.any():
                continue
            gate = torch.zeros(x.shape[0])
            for k in range(K):
                here = chosen[:, k] == e
                gate[here] = w[here, k]
            y[mine] += gate[mine].unsqueeze(-1) * expert(x[mine])
        return y


class SelectedByWeight(Chosen):
    """Rows are the tokens that have a weight for the expert; logits are weights, so that some are below 0."""

    def choose(self, x):
        return self.router(x).topk(K, dim=-1)

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            hit = chosen == e
            if hit.any():
                gate = (w * hit.float()).sum(dim=-1, keepdim=True)
                rows = gate.squeeze(-1) > 0
                if rows.any():
                    y[rows] += self.experts[e](x[rows]) * gate[rows]
        return y


class WeightsOfRowsBySlot(Chosen):
    """The weights of the expert's rows are filled in among these rows."""

    def filled(self, w, chosen, mine, e):
        gate = torch.zeros(mine.sum())
        for k in range(K):
            here = chosen[mine, k] == e
            gate[here] = w[mine, k][here]
        return gate

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (chosen == e).any(-1)
            if not mine.any():
                continue
            gate = self.filled(w, chosen, mine, e)
            y[mine] += gate.unsqueeze(-1) * expert(x[mine])
        return y


class MaskAndWeight(Chosen):
    """A slot's mask is of the pairs that chose the expert and have a weight, made anew for each expert."""

    def forward(self, x):
        w, chosen = self.choose(x)
        w = torch.where(w > 0.55, w, torch.zeros_like(w))
        y = torch.zeros_like(x)
        for k in range(K):
            for e in range(E):
                here = (chosen[:, k] == e) & (w[:, k] > 0)
                if here.any():
                    y[here] += w[here, k].unsqueeze(-1) * self.experts[e](x[here])
        return y


FUSED = (SelectedByWeight, RowsCutAgain, RowsCutByBoth, WeightsBySlot, WeightsOfRowsBySlot, MaskAndWeight)


@pytest.mark.parametrize("kind", FUSED, ids=lambda k: k.__name__)
def test_fused_and_equal(kind):
    torch.manual_seed(0)
    assert_fused_at_any_size(kind(), H)


@pytest.mark.parametrize("kind", [RowsCutAgain, WeightsOfRowsBySlot, MaskAndWeight], ids=lambda k: k.__name__)
def test_gradients(kind):
    torch.manual_seed(0)
    module = kind()
    run, _ = compiled(module)
    x = (torch.randn(13, H),)
    assert_close(gradients(run, module, x), gradients(module, module, x), 1e-4)


class OneSlotShort(WeightsBySlot):
    """The last slot's weights are left out."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (chosen == e).any(-1)
            gate = torch.zeros(x.shape[0])
            for k in range(K - 1):
                here = chosen[:, k] == e
                gate[here] = w[here, k]
            y[mine] += gate[mine].unsqueeze(-1) * expert(x[mine])
        return y


class AnotherSlotsWeight(WeightsBySlot):
    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (chosen == e).any(-1)
            gate = torch.zeros(x.shape[0])
            for k in range(K):
                here = chosen[:, k] == e
                gate[here] = w[here, K - 1 - k]
            y[mine] += gate[mine].unsqueeze(-1) * expert(x[mine])
        return y


class OneSlotOfRowsShort(WeightsOfRowsBySlot):
    def filled(self, w, chosen, mine, e):
        gate = torch.zeros(mine.sum())
        for k in range(K - 1):
            here = chosen[mine, k] == e
            gate[here] = w[mine, k][here]
        return gate


class AnotherSlotsWeightOfRows(WeightsOfRowsBySlot):
    def filled(self, w, chosen, mine, e):
        gate = torch.zeros(mine.sum())
        for k in range(K):
            here = chosen[mine, k] == e
            gate[here] = w[mine, K - 1 - k][here]
        return gate


class FilledIntoHalves(WeightsOfRowsBySlot):
    def filled(self, w, chosen, mine, e):
        gate = torch.full((int(mine.sum()),), 0.5)
        gate[chosen[mine, 0] == e] = w[mine, 0][chosen[mine, 0] == e]
        return gate


class MaskOfTheTurn(MaskAndWeight):
    """The mask beside the choice differs from expert to expert."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where((chosen == e) & (w > 0.1 * e + 0.3))
            y.index_add_(0, token, w[token, slot, None] * self.experts[e](x[token]))
        return y


class DrawnInTheTurn(MaskAndWeight):
    """The pairs that are left out are drawn anew for each expert."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where((chosen == e) & (torch.rand(chosen.shape) > 0.3))
            y.index_add_(0, token, w[token, slot, None] * self.experts[e](x[token]))
        return y


class NeighboursRows(Chosen):
    """The mask that cuts the rows is another expert's."""

    def forward(self, x):
        _, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            mine = (chosen == e).any(dim=-1)
            rows = self.experts[e](x[mine])
            here = (chosen[:, 0] == (e + 1) % E)[mine]
            y[torch.where(mine)[0][here]] += rows[here]
        return y


class RowsNotAMask(Chosen):
    """Numbers of rows are asked for one that is not 0: where only row 0 is an expert's, nothing is added."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            rows = torch.where(chosen[:, 0] == e)[0]
            if rows.any():
                y[rows] += x[rows]
            t, s = torch.where(chosen == e)
            y.index_add_(0, t, self.experts[e](x[t]) * w[t, s, None])
        return y


class AboveALimit(SelectedByWeight):
    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            gate = (w * (chosen == e)).sum(dim=-1)
            rows = gate > -0.1
            y[rows] += expert(x[rows]) * gate[rows].unsqueeze(-1)
        return y


NEAR = (
    AboveALimit,
    OneSlotShort,
    AnotherSlotsWeight,
    OneSlotOfRowsShort,
    AnotherSlotsWeightOfRows,
    FilledIntoHalves,
    MaskOfTheTurn,
    NeighboursRows,
    RowsNotAMask,
)


@pytest.mark.parametrize("kind", NEAR, ids=lambda k: k.__name__)
def test_near_misses_compute_what_they_did(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module)
    with torch.no_grad():
        for count in (13, 1):
            assert_same_call(run, module, (torch.randn(count, H),))
    assert all(site.status != "fused" for site in report.sites), report


def test_random_numbers_are_drawn_as_often_as_eager_does():
    torch.manual_seed(0)
    module, x = DrawnInTheTurn(), torch.randn(13, H)
    run, report = compiled(module)
    with torch.no_grad():
        for seed in range(3):
            torch.manual_seed(seed)
            want = module(x)
            torch.manual_seed(seed)
            assert_close([run(x)], [want], 1e-5)
    assert [site.status for site in report.sites] == ["declined"], report


def test_the_guard_that_is_left_out_must_ask_a_mask():
    torch.manual_seed(0)
    run, report = compiled(RowsNotAMask())
    with torch.no_grad():
        run(torch.randn(13, H))
    assert any("asks numbers of rows" in str(each) for each in report.not_rolled), report
