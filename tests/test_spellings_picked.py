"""Expert choice in batches: one graph, fused, with eager's outputs and gradients; near misses are not."""

from __future__ import annotations

import pytest
import torch
from spelling_table import error, measured, tensors
from spellings_picked import NEAR, SPELLINGS
from test_spellings_more import compiled


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
def test_fused_and_equal(spelling):
    found = measured(spelling)
    assert found.one_graph
    assert found.fused, found.why
    assert found.forward < 1e-5
    assert found.gradients < 1e-4


@pytest.mark.parametrize("kind", NEAR, ids=lambda k: k.__name__)
def test_near_misses_compute_what_they_did(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module)
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        assert error(tensors(run(x)), tensors(module(x))) == 0
    assert [site.status for site in report.sites] == ["declined"], report
    assert all(reason.location for site in report.sites for reason in site.reasons)
