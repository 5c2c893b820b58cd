"""Every spelling: one graph, fused, and eager's outputs and gradients."""

from __future__ import annotations

import pytest
from spelling_table import measured
from spellings import SPELLINGS


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
def test_one_graph_fused_and_equal(spelling):
    found = measured(spelling)
    assert found.one_graph
    assert found.fused, found.why
    assert found.forward < 1e-5
    assert found.gradients < 1e-4


def test_each_spelling_has_three_examples():
    for number in ("P1", "P2", "P3", "P4", "P5", "P6", "P8", "P9", "P10", "P11", "P12"):
        assert sum(s.spelling == number for s in SPELLINGS) >= 3, number
