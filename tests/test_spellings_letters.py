"""Layers read off the letters of axes: one graph, fused, equal for any T; near misses are declined, with a reason."""

from __future__ import annotations

import pytest
import spellings_letters
import torch
from spelling_table import measured
from test_spellings_more import assert_declined, assert_spelling_at_any_size


@pytest.mark.parametrize("spelling", spellings_letters.SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
def test_fused_and_equal(spelling):
    found = measured(spelling)
    assert found.one_graph
    assert found.fused, found.why
    assert found.forward < 1e-5
    assert found.gradients < 1e-4


@pytest.mark.parametrize("spelling", spellings_letters.SPELLINGS[::5], ids=lambda s: f"{s.spelling}-{s.name}")
def test_any_number_of_tokens(spelling):
    assert_spelling_at_any_size(spelling)


@pytest.mark.parametrize("kind", spellings_letters.NEAR, ids=lambda k: k.__name__)
@pytest.mark.parametrize("proof", ["on", "off"])
def test_near_misses_compute_what_they_did(kind, proof):
    torch.manual_seed(0)
    assert_declined(kind(), proof)
