"""Gates as one table, flat tables of seats, expert choice in batches: one graph, fused, equal; near misses are not."""

from __future__ import annotations

import pytest
import spellings_dropped
import spellings_gates
import spellings_left
import spellings_picked
import spellings_seats
import torch
from spelling_table import error, measured, tensors
from test_spellings_more import compiled

SPELLINGS = (
    *(*spellings_gates.SPELLINGS, *spellings_seats.SPELLINGS, *spellings_picked.SPELLINGS),
    *spellings_dropped.SPELLINGS,
)
NEAR = (
    *((kind, (13, 16)) for kind in (*spellings_gates.NEAR, *spellings_seats.NEAR)),
    *((kind, (13, 16)) for kind in (*spellings_left.LEFT, *spellings_left.NEAR)),
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
    run, report = compiled(module, kernels="eager")
    x = torch.randn(shape)
    with torch.no_grad():
        assert error(tensors(run(x)), tensors(module(x))) == 0
    assert [site.status for site in report.sites] == ["declined"], report
    assert all(reason.location for site in report.sites for reason in site.reasons)


@pytest.mark.parametrize("kind", spellings_left.BROKEN)
def test_what_dynamo_breaks_computes_what_it_did(kind):
    torch.manual_seed(0)
    module = kind(0.5)
    run, _ = compiled(module, kernels="eager")
    x = torch.randn(13, 16)
    with torch.no_grad():
        assert error(tensors(run(x)), tensors(module(x))) < 1e-6


@pytest.mark.parametrize("kind", spellings_dropped.KINDS, ids=lambda kind: kind.__name__)
def test_the_same_tokens_are_dropped_without_the_proof(kind):
    """All tokens to few experts, so that nearly all are dropped; what the passes say is used as it is."""
    torch.manual_seed(0)
    module = kind(0.5)
    run, report = compiled(module, proof="off", kernels="eager")
    x = torch.randn(2, 13, 16) + 3 if kind in spellings_dropped.BATCHED else torch.randn(13, 16) + 3
    with torch.no_grad():
        assert error(tensors(run(x)), tensors(module(x))) < 1e-5
    assert [site.status for site in report.sites] == ["fused"]
