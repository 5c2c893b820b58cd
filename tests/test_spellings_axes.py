"""Tokens on several axes: one graph, fused, equal (gradients: with the strangers); near misses are left alone."""

from __future__ import annotations

import pytest
import torch
from spellings_axes import NEAR, SPELLINGS
from test_spellings_more import assert_same_call, compiled, made, skewed


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
def test_fused_and_equal(spelling):
    module = made(spelling)
    run, report = compiled(module, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 13, 16), (3, 7, 16)):
            assert_same_call(run, module, (torch.randn(shape),))
        assert report.graphs == 1
        assert [s.status for s in report.sites] == ["fused"], report
        assert not report.not_rolled
        skewed(module)
        assert_same_call(run, module, (torch.randn(3, 7, 16),))


@pytest.mark.parametrize("kind", NEAR, ids=lambda k: k.__name__)
def test_near_misses_compute_what_they_did(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module)
    with torch.no_grad():
        assert_same_call(run, module, (torch.randn(3, 5, 16),))
    assert not any(site.status == "fused" for site in report.sites), report
