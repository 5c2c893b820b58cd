"""Chains of `where` and straight-through gates: fused and equal for any T; near misses are declined, with a reason."""

from __future__ import annotations

import pytest
import spellings_where
import torch
from spelling_table import error, gradients, measured, tensors
from test_spellings_more import assert_declined, compiled, made, skewed


@pytest.mark.parametrize("spelling", spellings_where.SPELLINGS, ids=lambda s: s.name)
def test_fused_and_equal(spelling):
    found = measured(spelling, counts=(13, 40))
    assert found.one_graph
    assert found.fused, found.why
    assert found.forward < 1e-5
    assert found.gradients < 1e-4


@pytest.mark.parametrize("spelling", spellings_where.SPELLINGS[:6:2], ids=lambda s: s.name)
def test_any_number_of_tokens_and_all_to_one(spelling):
    module = made(spelling)
    run, report = compiled(module, dynamic=True, kernels="eager")
    with torch.no_grad():
        for count in (13, 200, 7, 0):
            inputs = spelling.inputs(count)
            assert error(tensors(run(*inputs)), tensors(module(*inputs))) <= 1e-5
        skewed(module)
        inputs = spelling.inputs(7)
        assert error(tensors(run(*inputs)), tensors(module(*inputs))) <= 1e-5
    assert [s.status for s in report.graph_reports[0].sites] == ["fused"], report


@pytest.mark.parametrize("kind", spellings_where.NEAR, ids=lambda k: k.__name__)
@pytest.mark.parametrize("proof", ["on", "off"])
def test_near_misses_compute_what_they_did(kind, proof):
    torch.manual_seed(0)
    assert_declined(kind(), proof)


@pytest.mark.parametrize("kind", spellings_where.STRAIGHT, ids=lambda k: k.__name__)
def test_straight_through_gates_choose_where_nothing_is_trained(kind):
    torch.manual_seed(0)
    module, x = kind(), torch.randn(13, 16)
    run, report = compiled(module, kernels="eager")
    with torch.no_grad():
        assert error(tensors(run(x)), tensors(module(x))) < 1e-5
    assert [site.status for site in report.sites] == ["fused"], report
    run, report = compiled(module, kernels="eager")
    assert error(gradients(run, module, (x,)), gradients(module, module, (x,))) == 0
    (site,) = report.sites
    assert site.status == "declined"
    assert "every expert counts" in str(site.reasons[0])
    assert site.reasons[0].location
