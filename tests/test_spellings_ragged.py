"""Any number of experts a token: exactly the chosen rows run, with eager's outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from spellings_ragged import NEAR, SPELLINGS
from test_spellings_more import assert_close, compiled, gradients, made, skewed


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_fused_with_outputs_and_gradients(spelling):
    module = made(spelling)
    run, report = compiled(module, dynamic=True)
    for count in (13, 7):
        inputs = spelling.inputs(count)
        assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)
    skewed(module)
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs), module(*inputs), equal_nan=True)  # 0 / 0 stays what it is
    assert [s.status for s in report.graph_reports[0].sites] == ["fused"], report
    assert not report.not_rolled


@pytest.mark.parametrize("kind", NEAR, ids=lambda k: k.__name__)
def test_near_misses_compute_what_they_did(kind):
    torch.manual_seed(0)
    module = kind()
    run, _ = compiled(module)
    inputs = (torch.randn(13, 16),)
    assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)
