"""Layers without a loop: one graph, fused, equal for any T; near misses compute what they did and are not fused."""

from __future__ import annotations

import pytest
import torch
from spelling_table import error, measured, tensors
from spellings_whole import NEAR, SPELLINGS, AsksHowManyCounts, PairsOfWeight
from test_spellings_more import assert_close, assert_spelling_at_any_size, compiled, gradients


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
def test_fused_and_equal(spelling):
    found = measured(spelling)
    assert found.one_graph
    assert found.fused, found.why
    assert found.forward < 1e-5
    assert found.gradients < 1e-4


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
def test_any_number_of_tokens(spelling):
    assert_spelling_at_any_size(spelling)


@pytest.mark.parametrize(("kind", "inputs"), NEAR, ids=[kind.__name__ for kind, _ in NEAR])
@pytest.mark.parametrize("proof", ["on", "off"])
def test_near_misses_compute_what_they_did(kind, inputs, proof):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module, proof=proof, kernels="eager")
    with torch.no_grad():
        assert error(tensors(run(*inputs(13))), tensors(module(*inputs(13)))) == 0
    assert all(site.status == "declined" for site in report.sites), report
    assert all(reason.location for site in report.sites for reason in site.reasons)
    assert not any("was tried" in str(reason) for site in report.sites for reason in site.reasons)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_branch_on_how_many_counts_there_are_breaks_the_graph(dynamic):
    torch.manual_seed(0)
    module = AsksHowManyCounts()
    run, report = compiled(module, dynamic=dynamic, kernels="eager")
    with torch.no_grad():
        for count in (13, 7, 1):
            x = torch.randn(count, module.up.shape[1])
            assert error([run(x)], [module(x)]) <= 1e-5
    assert report.graphs > 1
    assert {site.status for site in report.sites} == {"fused"}, report
    assert not any(note for graph in report.graph_reports for note in graph.notes)


def test_pairs_that_are_selected_by_weight_are_rows_of_one_expert_each():
    torch.manual_seed(0)
    module = PairsOfWeight()
    run, report = compiled(module, dynamic=True, kernels="eager")
    with torch.no_grad():
        for count in (13, 200, 2):
            x = torch.randn(count, module.up.shape[1])
            assert error([run(x)], [module(x)]) <= 1e-5
    assert report.graphs == 1
    assert [site.status for site in report.sites] == ["fused"], report
    run, report = compiled(module, kernels="eager")
    x = (torch.randn(13, module.up.shape[1]),)
    assert_close(gradients(run, module, x), gradients(module, module, x), 1e-4)
    assert report.graphs == 1
