"""Spellings by strangers: one graph, fused, with eager's outputs and gradients; their near misses are left alone."""

from __future__ import annotations

import pytest
import spellings_axes
import torch
from spellings_strangers import NEAR, SPELLINGS, ExpertsWithDropout
from test_spellings_more import assert_same_call, compiled, made, skewed, trained


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
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


@pytest.mark.parametrize("spelling", [*SPELLINGS, *spellings_axes.SPELLINGS], ids=lambda s: f"{s.spelling}-{s.name}")
def test_gradients(spelling):
    *_, report, _ = trained(spelling)
    assert [s.status for s in report.sites] == ["fused"], report


def test_dropout_that_drops_nothing_is_no_operation():
    torch.manual_seed(0)
    module = ExpertsWithDropout().eval()
    run, report = compiled(module)
    with torch.no_grad():
        assert_same_call(run, module, (torch.randn(13, 16),))
    (site,) = report.sites
    assert site.status == "fused"
    assert "relu" in site.experts  # an MLP for the kernels, not a body that runs its own code


@pytest.mark.parametrize("kind", NEAR, ids=lambda k: k.__name__)
def test_near_misses_compute_what_they_did(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module)
    with torch.no_grad():
        assert_same_call(run, module, (torch.randn(13, 16),))
    assert not any("mlp" in site.experts and site.status == "fused" for site in report.sites), report
