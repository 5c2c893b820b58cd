"""Loops that read what they write, fail on rows they never have, or are no module's: right, or left with reasons."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K
from spellings_strangers import Chosen
from test_spellings_more import assert_close, assert_same_call, compiled, gradients
from torch import nn

import moec


class AddsToItsRows(Chosen):
    def forward(self, x):
        w, chosen = self.choose(x)
        x = x * 1.0
        for e, expert in enumerate(self.experts):
            t, s = torch.where(chosen == e)
            x[t] = x[t] + w[t, s, None] * expert(x[t])
        return x


class AddsToItsRowsByMask(Chosen):
    def forward(self, x):
        _, chosen = self.choose(x)
        x = x.clone()
        for e, expert in enumerate(self.experts):
            mine = (chosen == e).any(-1)
            x[mine] += expert(x[mine])
        return x


class AddsByIndex(Chosen):
    def forward(self, x):
        w, chosen = self.choose(x)
        y = x.clone()
        for e, expert in enumerate(self.experts):
            t, s = torch.where(chosen == e)
            y.index_add_(0, t, w[t, s, None] * expert(y[t]))
        return y


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(H), nn.Linear(H, H)

    def forward(self, x):
        return self.out(self.norm(x))


class AddsOwnCodeToItsRows(AddsByIndex):
    expert = Normed


class OneExpertAToken(Chosen):
    def forward(self, x):
        w, chosen = F.softmax(self.router(x), -1).max(-1)
        y = x * 1.0
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            y[mine] += w[mine].unsqueeze(-1) * expert(y[mine])
        return y


class CopyBesideItsRows(Chosen):
    def forward(self, x):
        w, chosen = self.choose(x)
        y = x.clone()
        for e, expert in enumerate(self.experts):
            t, s = torch.where(chosen == e)
            y[t] += w[t, s, None] * expert(x[t])
        return y


class RoutesByWhatWasAdded(Chosen):
    def forward(self, x):
        y = x.clone()
        for e, expert in enumerate(self.experts):
            mine = self.router(y).argmax(-1) == e
            y[mine] += expert(y[mine])
        return y


@pytest.mark.parametrize(
    "kind", [AddsToItsRows, AddsToItsRowsByMask, AddsByIndex, AddsOwnCodeToItsRows, RoutesByWhatWasAdded]
)
def test_what_an_earlier_expert_added_is_not_read_as_if_it_were_not(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module, dynamic=True)
    with torch.no_grad():
        for count in (13, 0):
            assert_same_call(run, module, (torch.randn(count, H),))  # a refused proof would warn, which is an error
    assert not any(site.status == "fused" for site in report.sites)


def test_the_reason_names_the_tensor_and_the_way_out():
    torch.manual_seed(0)
    run, report = compiled(AddsToItsRows())
    run(torch.randn(7, H))
    (reason,) = report.sites[0].reasons
    assert "reads rows of %" in str(reason)
    assert "earlier one added" in str(reason)
    assert "clone()" in str(reason)
    assert "test_loops_apart.py" in reason.location


@pytest.mark.parametrize("kind", [OneExpertAToken, CopyBesideItsRows])
def test_rows_that_no_other_expert_changed_are_fused(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module)
    x = (torch.randn(13, H),)
    assert_close(gradients(run, module, x), gradients(module, module, x), 1e-4)
    assert [s.status for s in report.sites] == ["fused"], report


class Misfit(nn.Module):
    """Fails on any rows."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, WIDTH), nn.Linear(H, H)

    def forward(self, x):
        return self.down(self.up(x))


class NeverHasRows(Chosen):
    expert = Misfit

    def forward(self, x):
        chosen = self.router(x).argmax(-1) + E
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            if mine.any():
                y[mine] += expert(x[mine])
        return y


class NeverHit(Chosen):
    expert = Misfit

    def forward(self, x):
        w, chosen = self.choose(x)
        mask = F.one_hot(chosen + E, 3 * E).permute(2, 1, 0)[:E]
        y = torch.zeros_like(x)
        for e in torch.nonzero(mask.sum((1, 2)) > 0):
            s, t = torch.where(mask[e[0]])
            y.index_add_(0, t, self.experts[e[0]](x[t]) * w[t, s, None])
        return y


@pytest.mark.parametrize("kind", [NeverHasRows, NeverHit])
def test_a_body_that_would_fail_on_rows_it_never_has_stays_a_loop(kind):
    torch.manual_seed(0)
    module = kind().eval()
    with torch.no_grad():
        report = moec.explain(module, torch.randn(7, H), moec_options={"rest": "eager"})
        run, _ = compiled(module)
        assert_same_call(run, module, (torch.randn(7, H),))
    (stayed,) = {r.predicate for r in report.not_rolled}
    assert "rows that it may never have" in stayed
    assert "RuntimeError" in stayed
    assert any("test_loops_apart.py" in where for _, where in report.graph_breaks)


def plain(x, router, experts):
    w, chosen = F.softmax(router(x), -1).topk(K, -1)
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        t, s = torch.where(chosen == e)
        if t.numel() > 0:
            y.index_add_(0, t, expert(x[t]) * w[t, s, None])
    return y


def test_a_function_that_is_compiled_itself_says_why_its_loop_stays():
    torch.manual_seed(0)
    module = Chosen()
    report = moec.explain(plain, torch.randn(7, H), module.router, module.experts, moec_options={"rest": "eager"})
    assert ["function that is compiled itself" in r.predicate for r in report.not_rolled] == [True]
    assert any("plain is not compiled as a whole" in reason for reason, _ in report.graph_breaks)


class Sequences(Chosen):
    """Whole sequences x[B, S, H] go to k experts."""

    def forward(self, x):
        w, chosen = self.choose(x.mean(1))
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            b, s = torch.where(chosen == e)
            y[b] += expert(x[b]) * w[b, s][:, None, None]
        return y


class SequencesOneExpert(Chosen):
    def forward(self, x):
        w, chosen = F.softmax(self.router(x.mean(1)), -1).max(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            if mine.any():
                y[mine] = expert(x[mine]) * w[mine].view(-1, 1, 1)
        return y


class AcrossTheSequence(Chosen):
    """As wide as it is long: the experts' products are along the sequence, not the features."""

    def forward(self, x):
        w, chosen = self.choose(x.mean(1))
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            b, s = torch.where(chosen == e)
            y[b] += expert(x[b].transpose(1, 2)).transpose(1, 2) * w[b, s, None, None]
        return y


@pytest.mark.parametrize("kind", [Sequences, SequencesOneExpert])
def test_whole_sequences_are_routed(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module, dynamic=True)
    for batch, length in ((3, 5), (1, 1), (2, 7)):
        x = (torch.randn(batch, length, H),)
        assert_close(gradients(run, module, x), gradients(module, module, x), 1e-4)
    assert {s.status for s in report.sites} == {"fused"}, report


def test_products_along_a_sequence_are_not_taken_for_features():
    torch.manual_seed(0)
    module = AcrossTheSequence()
    run, report = compiled(module)
    with torch.no_grad():
        assert_same_call(run, module, (torch.randn(3, H, H),))
    assert not any("mlp" in site.experts and site.status == "fused" for site in report.sites), report


class OneRowWritten(Chosen):
    """Own code, one expert a token; the weight comes first in the product that is written."""

    expert = Normed

    def forward(self, x):
        w, chosen = F.softmax(self.router(x), -1).max(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            y[mine] = w[mine, None] * expert(x[mine])
        return y


class OneRowWithResidual(OneRowWritten):
    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            if mine.any():
                y[mine] = x[mine] + expert(x[mine])
        return y


@pytest.mark.parametrize("kind", [OneRowWritten, OneRowWithResidual])
def test_rows_that_own_code_writes_once(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module)
    x = (torch.randn(13, H),)
    assert_close(gradients(run, module, x), gradients(module, module, x), 1e-4)
    assert [s.status for s in report.sites] == ["fused"], report
