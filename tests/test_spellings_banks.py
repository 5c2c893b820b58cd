"""Banks kept in other forms: one fused site, eager's outputs and gradients at awkward sizes; near misses are left."""

from __future__ import annotations

import pytest
import torch
from spellings_banks import LEGAL, NEAR, SPELLINGS, Between, ByOneHot, SideBySide
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
    assert site.status == "fused", report


@pytest.mark.parametrize("kind", [Between, SideBySide, ByOneHot], ids=lambda k: k.__name__)
@pytest.mark.parametrize("count", [1, 200])
def test_kernels_read_banks_where_they_lie(kind, count):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module)
    x = torch.randn(16, count).t()  # tokens are columns
    with torch.no_grad():
        assert_same_call(run, module, (x,))
    assert [site.status for site in report.sites] == ["fused"]


@pytest.mark.parametrize("kind", [*NEAR, *LEGAL], ids=lambda k: k.__name__)
def test_near_misses_compute_what_they_did(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module)
    inputs = (torch.randn(13, 16),)
    assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)
    if kind in NEAR:
        assert not any(site.status == "fused" for site in report.sites), report
