"""Matrices kept as codes: fused, with eager's outputs and the gradients of what is trained."""

from __future__ import annotations

import pytest
import torch
from spellings_coded import NEAR, SPELLINGS, FullInHalf, HalfTrained
from test_spellings_more import assert_close, compiled, gradients, made

pytestmark = pytest.mark.filterwarnings("ignore:moec. eager experts:RuntimeWarning")  # no C++ gradients of codes


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_fused_with_outputs_and_gradients(spelling):
    module = made(spelling)
    run, report = compiled(module, dynamic=True)
    for count in (13, 7):
        inputs = spelling.inputs(count)
        assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)
    assert [s.status for s in report.graph_reports[0].sites] == ["fused"], report


def test_codes_are_named_by_the_spec():
    torch.manual_seed(0)
    for spelling, codes in zip(SPELLINGS, ("int8:1x0", "fp8:0x0", "int8:1x0", "fp8:8x8", "bf16"), strict=False):
        module = made(spelling)
        run, report = compiled(module)
        inputs = spelling.inputs(7)
        with torch.no_grad():
            assert_close([run(*inputs)], [module(*inputs)], 1e-5)
        assert f"codes={codes}" in report.sites[0].spec, report.sites[0].spec


def test_trained_parameters_are_cast_once():
    torch.manual_seed(0)
    module = FullInHalf()
    run, report = compiled(module)
    inputs = (torch.randn(13, 16),)
    assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 2e-2)
    assert [s.status for s in report.sites] == ["fused"], report
    run, report = compiled(module)
    with torch.no_grad():
        assert_close([run(*inputs)], [module(*inputs)], 2e-2)
    assert [s.status for s in report.sites] == ["fused"]
    run, report = compiled(module)
    inputs = (torch.randn(1, 16),)
    with torch.no_grad():
        assert_close([run(*inputs)], [module(*inputs)], 2e-2)
    assert [s.status for s in report.sites] == ["declined"]
    assert "bf16" in str(report.sites[0].reasons[0])


def test_trained_parameters_may_be_narrower_than_the_products():
    torch.manual_seed(0)
    module, inputs = HalfTrained(), (torch.randn(13, 16),)
    run, report = compiled(module)
    assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-2)
    assert [s.status for s in report.sites] == ["fused"], report


@pytest.mark.parametrize("kind", NEAR, ids=lambda k: k.__name__)
def test_other_ways_to_make_a_matrix_are_declined_with_a_reason(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module)
    inputs = (torch.randn(13, 16),)
    assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)
    (site,) = report.sites
    assert site.status == "declined", report
    assert __file__.replace("test_", "") in site.reasons[0].location
