"""Published layers as people adapt them: one graph, fused, with eager's outputs and gradients; near misses are not."""

from __future__ import annotations

import pytest
import torch
from spellings_adapted import NEAR, SPELLINGS
from test_spellings_more import assert_close, assert_same_call, compiled, gradients, made, skewed


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
def test_fused_and_equal(spelling):
    module = made(spelling)
    run, report = compiled(module, dynamic=True)
    for count in (13, 7):
        inputs = spelling.inputs(count)
        assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)
    (site,) = report.sites
    assert site.status == "fused", report
    assert site.proof.startswith("proved"), site.proof
    assert report.graphs == 1
    assert not report.not_rolled
    skewed(module)
    with torch.no_grad():
        assert_same_call(run, module, spelling.inputs(7))


@pytest.mark.parametrize("kind", NEAR, ids=lambda k: k.__name__)
@pytest.mark.filterwarnings("error::RuntimeWarning")  # the matcher leaves them, not the proof, which says so aloud
def test_near_misses_compute_what_they_did(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module)
    with torch.no_grad():
        for count in (13, 2):
            assert_same_call(run, module, (torch.randn(count, 16),))
    assert not any("mlp" in site.experts and site.status == "fused" for site in report.sites), report
