"""Experts of several kinds in one list: one graph, the MLPs fused, equal; near misses compute what they did."""

from __future__ import annotations

import pytest
import torch
from spelling import H
from spellings_kinds import NEAR, SPELLINGS, Copied, Mixed, TwoMlps
from test_spellings_more import assert_same_call, compiled, made, skewed, trained

from moec.capture.kinds import kinds_among


def statuses(report, spelling):
    """Of the layers found, those of MLPs; constants with tensors of their own are reported as another."""
    found = [s.status for s in report.sites]
    return [s for s in found if s == "fused"] if spelling.name == "FourKinds" else found


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
def test_fused_and_equal(spelling):
    module = made(spelling)
    run, report = compiled(module, dynamic=True)
    with torch.no_grad():
        for count in (13, 7, 200):
            assert_same_call(run, module, spelling.inputs(count))
        assert report.graphs == 1
        assert statuses(report, spelling) == ["fused"], report
        assert not report.not_rolled
        skewed(module)
        for count in (7, 1, 0):
            assert_same_call(run, module, spelling.inputs(count))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
def test_gradients(spelling):
    *_, report, _ = trained(spelling)
    assert statuses(report, spelling) == ["fused"], report


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
def test_equal_without_the_proof(spelling):
    module = made(spelling)
    run, _ = compiled(module, proof="off", kernels="eager")
    with torch.no_grad():
        for shift in (0, 3, -3):
            assert_same_call(run, module, (torch.randn(13, H) + shift,))


def test_two_kinds_of_mlps_are_two_layers_over_the_same_tokens():
    torch.manual_seed(0)
    module = TwoMlps()
    run, report = compiled(module)
    with torch.no_grad():
        for count in (13, 1):
            assert_same_call(run, module, (torch.randn(count, H),))
    assert [s.status for s in report.graph_reports[0].sites] == ["fused", "fused"], report
    assert {s.status for s in report.sites} == {"fused"}


def test_an_expert_of_another_kind_than_before_is_seen():
    torch.manual_seed(0)
    module, x = Mixed(), torch.randn(13, H)
    run, _ = compiled(module)
    with torch.no_grad():
        assert_same_call(run, module, (x,))
        module.experts[3] = module.experts[0]
        assert_same_call(run, module, (x,))
        module.experts[1] = Copied()
        assert_same_call(run, module, (x,))


@pytest.mark.parametrize("kind", NEAR, ids=lambda kind: kind.__name__)
def test_near_misses_compute_what_they_did(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module, proof="off", kernels="eager")
    with torch.no_grad():
        for shift in (0, 3):
            assert_same_call(run, module, (torch.randn(13, H) + shift,))
    assert all(site.status != "fused" for site in report.sites), report


def test_kinds_are_runs_of_like_experts_those_without_tensors_first():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert kinds_among([a, b, Copied()]) == ((2, 3), (0, 2))
    assert kinds_among([Copied(), a, b]) == ((0, 1), (1, 3))
    assert kinds_among([a, b]) == ()
    assert kinds_among([a, Copied()]) == ()
    assert kinds_among([a, Copied(), b, a, Copied(), a]) == ()
