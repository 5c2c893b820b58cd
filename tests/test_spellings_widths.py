"""Experts of another output width and experts of one matrix: fused, with eager's outputs and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from spellings_widths import NEAR, ONE, TWO, H, Sequences
from test_spellings_more import assert_close, compiled, gradients

BY_KERNEL = ("ValueHeads", "Stacked", "Gathered", "OneLinear", "GatedLinear")  # the others by the eager twin


def made(spelling):
    torch.manual_seed(0)
    return spelling()


def inputs(spelling, count, dtype=torch.float32):
    made = torch.randn(2 * count, H, generator=torch.Generator().manual_seed(count)).to(dtype)
    return (made.view(2, count, H),) if issubclass(spelling, Sequences) else (made[:count],)


def skew(module):
    """Ties: all tokens to the same experts, the others idle."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("gate", "router")):
                parameter.zero_()


@pytest.mark.parametrize("spelling", [*TWO, *ONE], ids=lambda s: s.__name__)
def test_fused_with_outputs_and_gradients(spelling):
    module = made(spelling)
    options = {} if spelling.__name__ in BY_KERNEL else {"kernels": "eager"}
    dynamic = None if "LowRank" in spelling.__name__ else True  # which makes a symbol of a scaling factor
    run, report = compiled(module, dynamic=dynamic, **options)
    for count in (13, 7, 200):
        given = inputs(spelling, count)
        assert_close([run(*given)], [module(*given)], 1e-5)
        assert_close(gradients(run, module, given), gradients(module, module, given), 1e-4)
    skew(module)
    assert_close(gradients(run, module, given), gradients(module, module, given), 1e-4)
    (site,) = report.graph_reports[0].sites
    assert site.status == "fused", report
    assert f"O={module.O}" in site.experts
    assert ("F=" in site.experts) == (spelling in TWO or spelling.__name__.endswith("LowRank"))
    if not options:
        for count in (0, 1):
            given = inputs(spelling, count)
            with torch.no_grad():
                assert_close([run(*given)], [module(*given)], 1e-5)


@pytest.mark.parametrize("name", ["Stacked", "OneLinear"])
def test_bf16(name):
    spelling = next(s for s in (*TWO, *ONE) if s.__name__ == name)
    module = made(spelling).bfloat16()
    exact = copy.deepcopy(module).double()
    run, report = compiled(module)
    (given,) = inputs(spelling, 13, torch.bfloat16)
    with torch.no_grad():
        got, eager, want = run(given), module(given), exact(given.double())
    assert got.dtype == torch.bfloat16
    assert float((got - want).norm()) <= max(1.5 * float((eager - want).norm()), 1e-2 * float(want.norm()))
    assert [site.status for site in report.sites] == ["fused"]


@pytest.mark.parametrize(("spelling", "why"), NEAR, ids=lambda s: getattr(s, "__name__", ""))
def test_near_misses_are_left_as_they_are(spelling, why):
    module = made(spelling)
    run, report = compiled(module)
    given = inputs(spelling, 13)
    assert_close(gradients(run, module, given), gradients(module, module, given), 1e-5)
    assert all(site.status != "fused" for site in report.sites), report
    assert why in str(report)
