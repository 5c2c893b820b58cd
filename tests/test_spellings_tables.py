"""Gates as one table, flat tables of seats, expert choice in batches: one graph, fused, equal; near misses are not."""

from __future__ import annotations

import pytest
import spellings_gates
import spellings_picked
import spellings_seats
import torch
from spelling_table import error, measured, tensors
from test_spellings_more import compiled

SPELLINGS = (*spellings_gates.SPELLINGS, *spellings_seats.SPELLINGS, *spellings_picked.SPELLINGS)
NEAR = (
    *((kind, (13, 16)) for kind in (*spellings_gates.NEAR, *spellings_seats.NEAR)),
    *((kind, (3, 5, 16)) for kind in spellings_picked.NEAR),
)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
def test_fused_and_equal(spelling):
    found = measured(spelling)
    assert found.one_graph
    assert found.fused, found.why
    assert found.forward < 1e-5
    assert found.gradients < 1e-4


@pytest.mark.parametrize(("kind", "shape"), NEAR, ids=lambda value: getattr(value, "__name__", ""))
def test_near_misses_compute_what_they_did(kind, shape):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module)
    x = torch.randn(shape)
    with torch.no_grad():
        assert error(tensors(run(x)), tensors(module(x))) == 0
    assert [site.status for site in report.sites] == ["declined"], report
    assert all(reason.location for site in report.sites for reason in site.reasons)
