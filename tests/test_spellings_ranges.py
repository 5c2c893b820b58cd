"""Guards against experts that there are not: fused where no token can choose one, left as they were where some can."""

from __future__ import annotations

import pytest
import torch
from spellings_ranges import NEAR, OPEN, SPELLINGS, Open, choices
from test_spellings_more import assert_close, assert_same_call, compiled, gradients, made, skewed


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_fused_and_equal_for_any_number_of_tokens(spelling):
    module = made(spelling)
    run, report = compiled(module, dynamic=True)
    for count in (13, 7, 200):
        inputs = spelling.inputs(count)
        assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)
    assert report.graphs == 1, report.graph_breaks
    assert [s.status for s in report.graph_reports[0].sites] == ["fused"], report
    skewed(module)
    assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)
    with torch.no_grad():
        for count in (1, 0):
            assert_same_call(run, module, spelling.inputs(count))


@pytest.mark.parametrize("kind", NEAR, ids=lambda k: k.__name__)
def test_a_guard_that_meets_a_real_expert_is_kept(kind):
    torch.manual_seed(0)
    module = kind(bias=True)
    with torch.no_grad():  # one token and free numbers: rows that are not summed by the graph, and are written to
        assert_same_call(compiled(module, dynamic=True)[0], module, (torch.randn(1, module.router.in_features),))
    run, _ = compiled(module)
    inputs = (torch.randn(40, module.router.in_features),)
    assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)
    skewed(module)
    assert_close([run(*inputs)], [module(*inputs)], 1e-5)


@pytest.mark.parametrize("kind", OPEN, ids=lambda k: k.__name__)
def test_choices_that_may_name_nobody(kind):
    torch.manual_seed(0)
    module = Open(kind(bias=True))
    run, _ = compiled(module)
    with torch.no_grad():
        for count in (13, 40):
            assert_close([run(*choices(count))], [module(*choices(count))], 1e-5)
