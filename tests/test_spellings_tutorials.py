"""What small repositories and tutorials write is fused, with eager's results and gradients; near misses are not."""

from __future__ import annotations

import pytest
import spellings_joined as joined
import spellings_listed as listed
import spellings_tutorials as tutorials
import spellings_unrolled as unrolled
import torch
from test_spellings_more import assert_close, assert_same_call, compiled, gradients, made, skewed

SPELLINGS = (*tutorials.SPELLINGS, *listed.SPELLINGS, *joined.SPELLINGS, *unrolled.SPELLINGS)
NEAR = (*tutorials.NEAR, *listed.NEAR, *joined.NEAR, *unrolled.NEAR)


def seeded(run, module, inputs):
    """Gradients with the random numbers of one seed: routers may be noisy where they are trained."""
    torch.manual_seed(7)
    return gradients(run, module, inputs)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_fused_and_equal(spelling):
    module = made(spelling).eval()
    run, report = compiled(module, dynamic=True)
    with torch.no_grad():
        for count in (13, 7):
            assert_same_call(run, module, spelling.inputs(count))
        assert report.graphs == 1
        assert [s.status for s in report.sites] == ["fused"], report
        assert not report.not_rolled or spelling in unrolled.SPELLINGS
        for count in (1, 0):
            assert_same_call(run, module, spelling.inputs(count))
        skewed(module)
        assert_same_call(run, module, spelling.inputs(7))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_gradients(spelling):
    module = made(spelling)
    run, report = compiled(module)
    inputs = spelling.inputs(13)
    assert_close(seeded(run, module, inputs), seeded(module, module, inputs), 1e-4)
    assert [s.status for s in report.sites] == ["fused"], report


@pytest.mark.parametrize("kind", NEAR, ids=lambda k: k.__name__)
def test_near_misses_compute_what_they_did(kind):
    torch.manual_seed(0)
    module = kind()
    run, report = compiled(module)
    inputs = (torch.randn(13, 16),)
    with torch.no_grad():
        assert_same_call(run, module, inputs)
    assert not any("mlp" in site.experts and site.status == "fused" for site in report.sites), report
    assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)


def test_bodies_that_differ_in_their_gradient_stay_apart():
    torch.manual_seed(0)
    module = unrolled.WithoutGradient()
    run, report = compiled(module)
    inputs = (torch.randn(13, 16),)
    assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)
    assert not any(site.status == "fused" for site in report.sites), report
