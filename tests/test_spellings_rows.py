"""Rows that are a token each: fused, with eager's results and gradients; near misses are left alone."""

from __future__ import annotations

import pytest
import torch
from spellings_rows import NEAR, OWN_CODE, SPELLINGS, TRAINED
from test_spellings_more import assert_same_call, compiled, made, skewed, trained


@pytest.mark.parametrize("spelling", [*SPELLINGS, *OWN_CODE], ids=lambda s: s.name)
def test_fused_and_equal(spelling):
    module = made(spelling)
    run, report = compiled(module, dynamic=True)
    with torch.no_grad():
        for count in (13, 7):
            assert_same_call(run, module, spelling.inputs(count))
        assert report.graphs == 1
        assert [s.status for s in report.sites] == ["fused"], report
        assert not report.not_rolled
        skewed(module)
        assert_same_call(run, module, spelling.inputs(7))


@pytest.mark.parametrize("spelling", [s for s in (*SPELLINGS, *OWN_CODE) if s.name in TRAINED], ids=lambda s: s.name)
def test_gradients(spelling):
    *_, report, _ = trained(spelling)
    assert [s.status for s in report.sites] == ["fused"], report


@pytest.mark.parametrize("kind", NEAR, ids=lambda k: k.__name__)
def test_near_misses_compute_what_they_did(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module)
    with torch.no_grad():
        assert_same_call(run, module, (torch.randn(13, 16),))
    assert not any("mlp" in site.experts and site.status == "fused" for site in report.sites), report
