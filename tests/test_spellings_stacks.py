"""Layers in the manner of serving and training stacks: one graph, fused, equal outputs and gradients."""

from __future__ import annotations

import pytest
import spellings_stacks
import torch
from spelling_table import error, measured, tensors
from test_spellings_more import compiled


@pytest.mark.parametrize("spelling", spellings_stacks.SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
def test_fused_and_equal(spelling):
    found = measured(spelling)
    assert found.one_graph
    assert found.fused, found.why
    assert found.forward < 1e-5
    assert found.gradients < 1e-4


@pytest.mark.parametrize("kind", spellings_stacks.LEFT_ALONE, ids=lambda kind: kind.__name__)
def test_left_alone_with_a_reason(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module)
    x = torch.randn(13, 16)
    with torch.no_grad():
        assert error(tensors(run(x)), tensors(module(x))) == 0
    assert [site.status for site in report.sites] == ["declined"], report
    assert all(reason.location for site in report.sites for reason in site.reasons)


@pytest.mark.parametrize("extra", [0, 3])
def test_rows_beyond_the_counts_are_left_out_as_before(extra):
    """`x[: sum(counts)].split(counts)` where counts are a list of the caller's own, and x is longer."""

    class Host(torch.nn.Module):
        def forward(self, x, w1, w2, w3):
            return spellings_stacks.run_experts(w1, w2, w3, x, torch.tensor([2, 0, 3, 1]))

    up, gate, down = torch.randn(4, 24, 16), torch.randn(4, 24, 16), torch.randn(4, 16, 24)
    x = torch.randn(6 + extra, 16)
    run, _ = compiled(Host())
    with torch.no_grad():
        assert error([run(x, up, down, gate)], [Host()(x, up, down, gate)]) < 1e-6
