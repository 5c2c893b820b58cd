"""Loops over choices and experts: one dispatch over all slots, with eager's outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from spellings_slots import NEAR, SPELLINGS, SlotsThenExperts
from test_spellings_more import assert_close, assert_same_call, compiled, gradients, made, skewed


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_one_site_with_outputs_and_gradients(spelling):
    module = made(spelling)
    run, report = compiled(module, dynamic=True)
    for count in (13, 7):
        inputs = spelling.inputs(count)
        assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)
    skewed(module)
    assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)
    (site,) = report.graph_reports[0].sites
    assert (site.status, site.top_k) == ("fused", 2), report
    assert site.proof.startswith("proved"), site.proof  # what is not lowered is not proved either
    assert not report.not_rolled


def test_columns_of_one_choice_are_the_routers_again():
    torch.manual_seed(0)
    module = SlotsThenExperts()
    run, report = compiled(module)
    with torch.no_grad():
        assert_same_call(run, module, (torch.randn(13, 16),))
    (site,) = report.sites
    assert "softmax" in site.router, report
    assert not site.reasons


@pytest.mark.parametrize("kind", NEAR, ids=lambda k: k.__name__)
@pytest.mark.filterwarnings("error::RuntimeWarning")  # the matcher leaves them, not the proof, which says so aloud
def test_near_misses_compute_what_they_did(kind):
    torch.manual_seed(0)
    module = kind()
    run, _ = compiled(module)
    inputs = (torch.randn(13, 16),)
    assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)
    skewed(module)
    assert_close([run(*inputs)], [module(*inputs)], 1e-5)
