"""Every spelling of tests/spellings_more.py: one graph, fused, and eager's outputs and gradients for any routing."""

from __future__ import annotations

import pytest
import torch
from compiling import compiled
from spelling_table import error, tensors
from spellings_more import SPELLINGS, Spelling

COUNTS = (13, 7, 40)  # one dynamic compile; the gradients' test compiles for 13 alone
SMALL = ("CountsByScatter", "SplitAndCat", "OpaqueMasks-LoraExpert", "CheckpointedHits")


def made(spelling: Spelling):
    torch.manual_seed(0)
    return spelling.make()


def skewed(module) -> None:
    """Every token has the same scores: ties, all tokens to the same experts, the others idle."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "router" in name:
                parameter.zero_()


class Kept:
    """A call that leaves the module's buffers as they were, and keeps what they were set to."""

    def __init__(self, run, module):
        self.run, self.module = run, module

    def __call__(self, *inputs):
        state = {name: t.clone() for name, t in self.module.state_dict().items()}
        out = self.run(*inputs)
        self.after = {name: t.clone() for name, t in self.module.state_dict().items()}
        self.module.load_state_dict(state)
        return out


def assert_same_call(run, module, inputs):
    """Equal outputs, and equal buffers and parameters afterwards."""
    got, want = Kept(run, module), Kept(module, module)
    assert_close([got(*inputs)], [want(*inputs)], 1e-5)
    assert_close(got.after.values(), want.after.values(), 1e-5)


def assert_fused_at_any_size(module, width):
    """One graph, one fused layer, equal outputs for x[T, width] with several T and with all tokens at one expert."""
    run, report = compiled(module, dynamic=True)
    with torch.no_grad():
        for count in (13, 7, 200):
            assert_same_call(run, module, (torch.randn(count, width),))
        assert [s.status for s in report.sites] == ["fused"], report
        assert report.graphs == 1
        assert_same_call(run, module, (torch.randn(0, width),))
        skewed(module)
        assert_same_call(run, module, (torch.randn(7, width),))


def assert_spelling_at_any_size(spelling):
    """Its layers are fused, outputs equal for several numbers of tokens, none, and all tokens at the same experts."""
    module = made(spelling)
    run, report = compiled(module, dynamic=True, kernels="eager")
    with torch.no_grad():
        for count in (13, 200, 1, 0):
            inputs = spelling.inputs(count)
            assert error(tensors(run(*inputs)), tensors(module(*inputs))) <= 1e-5
        assert [s.status for s in report.graph_reports[0].sites] == ["fused"] * spelling.sites, report
        skewed(module)
        inputs = spelling.inputs(13)
        assert error(tensors(run(*inputs)), tensors(module(*inputs))) <= 1e-5


def gradients(run, module, inputs):
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    module.zero_grad()
    state = {name: t.clone() for name, t in module.named_buffers()}
    run(*inputs).square().sum().backward()
    module.load_state_dict(state, strict=False)
    return [*(x.grad for x in inputs), *(p.grad for p in module.parameters())]


def trained(spelling):
    """The module, what runs it, its report and inputs: for those 13 tokens its gradients are eager's."""
    module = made(spelling)
    run, report = compiled(module)
    inputs = spelling.inputs(13)
    assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)
    return module, run, report, inputs


def assert_close(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        w = torch.zeros_like(g) if w is None and g is not None else w
        g = torch.zeros_like(w) if g is None and w is not None else g
        assert g is None or float((g - w).float().norm()) <= tolerance * max(float(w.float().norm()), 1e-6)


def assert_not_fused(module, width, trained=False):
    """Results, and where `trained` gradients, are the module's own, and no layer is fused; the report."""
    run, report = compiled(module, dynamic=True)
    for count in (13, 7):
        x = (torch.randn(count, width),)
        with torch.set_grad_enabled(trained):
            assert_same_call(run, module, x)
        if trained:
            assert_close(gradients(run, module, x), gradients(module, module, x), 1e-4)
    assert all(site.status != "fused" for site in report.sites), report
    return report


def assert_declined(module, proof):
    """One layer is declined, with reasons that name a line and no failed trial; results are the module's to the bit."""
    run, report = compiled(module, proof=proof, kernels="eager")
    x = torch.randn(13, 16)
    with torch.no_grad():
        assert error(tensors(run(x)), tensors(module(x))) == 0
    assert [site.status for site in report.sites] == ["declined"], report
    assert all(reason.location for site in report.sites for reason in site.reasons)
    assert not any("was tried" in str(reason) for site in report.sites for reason in site.reasons)


def assert_fused_in_training(module, width, counts=(13,)):
    """All layers are fused, and gradients are the module's own, for each number of tokens."""
    run, report = compiled(module)
    for count in counts:
        x = (torch.randn(count, width),)
        assert_close(gradients(run, module, x), gradients(module, module, x), 1e-4)
    assert {s.status for s in report.sites} == {"fused"}, report


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: f"{s.spelling}-{s.name}")
def test_one_graph_fused_and_equal(spelling):
    module = made(spelling)
    run, report = compiled(module, dynamic=True)
    with torch.no_grad():
        for count in COUNTS:
            inputs = spelling.inputs(count)
            assert_same_call(run, module, inputs)
        assert report.graphs == 1
        assert [s.status for s in report.graph_reports[0].sites] == ["fused"] * spelling.sites, report
        assert not report.not_rolled
        skewed(module)
        assert_same_call(run, module, inputs)


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s.trains], ids=lambda s: f"{s.spelling}-{s.name}")
def test_gradients(spelling):
    module = made(spelling)
    run, report = compiled(module)
    inputs = spelling.inputs(13)
    assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)
    assert report.graphs == 1
    assert [s.status for s in report.sites] == ["fused"] * spelling.sites, report
    skewed(module)
    assert_close(gradients(run, module, inputs), gradients(module, module, inputs), 1e-4)


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s.name in SMALL], ids=lambda s: s.name)
def test_one_token(spelling):
    module = made(spelling)
    run, _ = compiled(module)
    with torch.no_grad():
        assert_same_call(run, module, spelling.inputs(1))
