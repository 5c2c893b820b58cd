"""Loops whose experts take the first C of their rows: one graph, fused, equal; near misses are left as they are."""

from __future__ import annotations

import pytest
import torch
from spellings_firsts import BATCHED, KINDS, SPELLINGS
from spellings_firsts_near import NEAR, UNROLLED, CutOfOwnCode
from spellings_rows import CopyKept
from spellings_strangers import KeepsOthers
from test_spellings_more import assert_close, assert_same_call, compiled, gradients, made, trained

import moec


def crowded(module) -> None:
    """Nearly all tokens go to the same experts, so that nearly all are dropped."""
    with torch.no_grad():
        module.gate.weight.mul_(0.01)
        module.gate.weight[:2] += 0.3


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
def test_fused_and_equal(spelling):
    module = made(spelling)
    run, report = compiled(module, dynamic=True)
    with torch.no_grad():
        for count in (13, 7, 200):
            assert_same_call(run, module, spelling.inputs(count))
        assert report.graphs == 1
        assert [s.status for s in report.sites] == ["fused"], report
        assert not report.not_rolled
        crowded(module)
        for count in (13, 1, 0):
            assert_same_call(run, module, spelling.inputs(count))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
def test_gradients(spelling):
    module, run, report, inputs = trained(spelling)
    assert [s.status for s in report.sites] == ["fused"], report
    crowded(module)
    assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_same_tokens_are_dropped_without_the_proof(kind):
    torch.manual_seed(0)
    module = kind(0.5)
    run, report = compiled(module, proof="off", kernels="eager")
    with torch.no_grad():
        shape = (2, 13, 16) if kind in BATCHED else (13, 16)
        for shift in (0, 3, -3):
            assert_same_call(run, module, (torch.randn(shape) + shift,))
    assert [site.status for site in report.sites] == ["fused"]


@pytest.mark.parametrize("kind", [*NEAR, CutOfOwnCode], ids=lambda kind: kind.__name__)
def test_near_misses_compute_what_they_did(kind):
    torch.manual_seed(0)
    module = kind(0.6)
    run, report = compiled(module, proof="off", kernels="eager")
    with torch.no_grad():
        for shift in (0, 3):
            assert_same_call(run, module, (torch.randn(13, 16) + shift,))
    assert all(site.status != "fused" for site in report.sites), report


@pytest.mark.parametrize("kind", UNROLLED, ids=lambda kind: kind.__name__)
def test_branches_that_do_something_else_say_why(kind):
    torch.manual_seed(0)
    with torch.no_grad():
        report = moec.explain(kind(0.6), torch.randn(13, 16), moec_options={"rest": "eager"})
    assert len(report.not_rolled) == 1, report
    assert "spellings_firsts_near.py" in str(report.not_rolled[0])


@pytest.mark.parametrize("kind", [CopyKept, KeepsOthers], ids=lambda kind: kind.__name__)
def test_tokens_of_experts_that_a_loop_does_not_run_keep_what_they_are(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module)
    with torch.no_grad():
        assert_same_call(run, module, (torch.randn(13, 16),))
    assert [site.status for site in report.sites] == ["fused"], report
