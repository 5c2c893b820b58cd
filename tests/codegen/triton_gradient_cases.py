"""Triton kernels of gradients against the twin and float64, in the interpreter or on a GPU (elsewhere.py).

Run by test_triton.py in its own process.
"""

import dataclasses

import pytest
import torch
from elsewhere import DEVICE, There, moved
from moe_reference import make_params, relative, routing, weight_terms
from quick_interpreter import quick  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import ALL_FORMS, FORMS, LIMITS, SORTED, one_matrix, wide_biases, with_gate

import moec.runtime.ops  # noqa: F401  # defines the ops
from moec.codegen import twin
from moec.codegen.plan import Sizes
from moec.codegen.triton_config import sorted_config
from moec.errors import BuildError
from moec.ir.dtypes import DTYPES
from moec.runtime import backward_ops
from moec.runtime.fakes import of_step
from moec.runtime.triton import TritonKernel
from moec.runtime.triton_backward import TritonBackward, load_triton_backward

BACKWARD_FORMS = [FORMS[i] for i in (0, 1, 2, 5, 6, 8)]


def check_backward(
    form, dtype, T=5, kind="sentinels", H=20, F=24, E=3, k=2, save=False, config=None, O=None, one=False, wide=False
):
    spec = one_matrix(form, dtype) if one else wide_biases(form) if wide else with_gate(*form, dtype)
    O = F if one else O or H
    params = make_params(spec.experts, H, F, E, O=O)
    weights, experts = routing(kind, T, E, k)
    x, g = torch.randn(T, H).to(params[0].dtype), torch.randn(T, O).to(DTYPES[spec.y_dtype])
    needs = [True] * (2 + len(params))
    saved, forward = None, TritonKernel(spec, DEVICE)
    if save:
        saved = moved(torch.full((T * k, spec.experts.ab_views * F), torch.nan, dtype=params[0].dtype))
        y = There(forward).experts(x, weights, experts, params, "", "", saved)
        same = forward.with_config(sorted_config(forward.config_for(Sizes(T, H, F, E, k, O))))
        assert torch.equal(y, There(same).experts(x, weights, experts, params))
    backward = There(TritonBackward(forward.with_config(config) if config else forward))
    dx, dweights, dparams = backward(g, x, weights, experts, params, needs, saved)
    wide = [p.double() for p in params]
    want = twin.experts_backward(g.double(), x.double(), weights.double(), experts, wide, spec, needs)
    there = (experts >= 0) & (experts < E)
    assert torch.equal(dweights[~there], torch.zeros_like(dweights[~there]))
    terms = weight_terms(g, x, weights, experts, params, spec)
    assert ((dweights.double() - want[1]).abs() <= LIMITS[dtype] * terms)[there].all()
    pairs = [(dx, want[0]), *zip(dparams, want[2], strict=True)]
    for got, reference in pairs:
        assert got.shape == reference.shape
        assert relative(got, reference) < 2 * LIMITS[dtype]
    assert [t.dtype for t in (dx, dweights, *dparams)] == [t.dtype for t in (x, weights, *params)]


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("form", [FORMS[0], FORMS[4], FORMS[5]], ids=str)
def test_gradients_of_biases_in_another_dtype(form, save):
    check_backward(form, "bf16", save=save, wide=True)


@pytest.mark.parametrize("form", BACKWARD_FORMS, ids=str)
def test_gradients(form):
    check_backward(form, "f32")


@pytest.mark.parametrize("form", BACKWARD_FORMS, ids=str)
def test_gradients_in_two_steps_are_those_of_one(form):
    """Between the two, what forward kept may be gone."""
    spec, (T, H, F, E, k) = with_gate(*form, "f32"), (13, 20, 24, 3, 2)
    params, (weights, experts) = make_params(spec.experts, H, F, E), routing("sentinels", T, E, k)
    x, g = torch.randn(T, H), torch.randn(T, H)
    backward, needs = There(load_triton_backward(str(spec), DEVICE)), [True] * (2 + len(params))
    saved = moved(torch.empty(T * k, spec.experts.ab_views * F))
    There(TritonKernel(spec, DEVICE)).experts(x, weights, experts, params, "", "", saved)
    dx, dweights, dparams = backward(g, x, weights, experts, params, needs, saved)
    slopes = moved(torch.full((T * k, spec.experts.ab_views * F), torch.nan))
    last, first = (of_step(str(spec), needs, last) for last in (True, False))
    one = backward(g, x, weights, experts, params, last, saved, "last", slopes)
    two = backward(g, x, weights, experts, params, first, None, "first", slopes)
    assert [a or b for a, b in zip(last, first, strict=True)] == needs
    assert one[0].numel() == 0
    assert torch.equal(two[0], dx)
    assert torch.equal((one if last[1] else two)[1], dweights)
    for whole, a, b, here in zip(dparams, one[2], two[2], last[2:], strict=True):
        assert torch.equal(a if here else b, whole)
        assert (b if here else a).numel() == 0


class Ops(TorchDispatchMode):
    """The names of moec's ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [func._opname] if func.namespace == "moec" else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("least", [0, 1 << 40])
def test_large_calls_take_two_steps(monkeypatch, least):
    monkeypatch.setattr(backward_ops, "_LEAST_FREED", least)
    spec = with_gate("concat", "nk", True, False, "output")
    params = [moved(p.contiguous()).requires_grad_() for p in make_params(spec.experts, 16, 8, 3)]
    weights, experts = (moved(t) for t in routing("random", 5, 3, 2))
    x = moved(torch.randn(5, 16)).requires_grad_()
    leaves = [x, weights.requires_grad_(), *params]
    y, _ = torch.ops.moec.experts_training(x, weights, experts, params, str(spec), "triton", "always")
    with Ops() as ops:
        found = torch.autograd.grad(y.square().sum(), leaves)
    steps = ["experts_backward_last", "experts_backward_first"]
    assert ops.names == (["experts_backward"] if least else steps)
    plain = twin.experts(x, weights, experts, params, spec)
    wanted = torch.autograd.grad(plain.square().sum(), leaves)
    assert all(relative(a.cpu(), b.cpu()) < 1e-5 for a, b in zip(found, wanted, strict=True))


def test_a_second_step_without_a_first_one_is_an_error():
    """Its slopes were never written: what calls it computes all anew."""
    spec = with_gate("concat", "nk", True, False, "output")
    backward = TritonBackward(TritonKernel(spec, DEVICE))
    backward._unbuilt = BuildError("no such instruction")
    params, (weights, experts) = make_params(spec.experts, 16, 8, 3), routing("random", 5, 3, 2)
    x, slopes = torch.randn(5, 16), torch.empty(10, 16)
    with pytest.raises(BuildError, match="no such instruction"):
        There(backward)(x, x, weights, experts, params, [True] * 4, None, "first", slopes)


@pytest.mark.parametrize("form", BACKWARD_FORMS, ids=str)
def test_gradients_from_what_forward_kept(form):
    check_backward(form, "f32", save=True)


@pytest.mark.parametrize(("form", "O"), [(FORMS[0], 1), (FORMS[2], 37)], ids=str)
def test_gradients_of_another_width(form, O):
    check_backward(form, "f32", O=O)


@pytest.mark.parametrize(("form", "save"), [(FORMS[0], True), (FORMS[2], False), (FORMS[5], False)], ids=str)
def test_gradients_without_an_output_matrix(form, save):
    check_backward(form, "f32", F=17, save=save, one=True)


@pytest.mark.parametrize("save", [False, True])
def test_gradients_in_half_precision(save):
    check_backward(FORMS[2], "bf16", save=save)


@pytest.mark.parametrize("form", [FORMS[i] for i in (2, 5, 6)], ids=str)
def test_gradients_in_tiles_that_end_in_parts(form):
    check_backward(form, "f32", F=136, config=dataclasses.replace(SORTED, block_n=128))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_all_gradients(form, dtype):
    for T, kind in ((1, "random"), (7, "same"), (13, "sentinels"), (70, "random")):
        check_backward(form, dtype, T, kind, 33, 70, 4, 2, save=T in (7, 70))


def test_gradients_that_are_not_wanted_are_empty():
    spec = with_gate("concat", "nk", True, True, "output")
    params = make_params(spec.experts, 16, 8, 2)
    weights, experts = routing("random", 3, 2, 1)
    needs = [False, True, False, True, False, False]
    backward = There(load_triton_backward(str(spec), DEVICE))
    x = torch.randn(3, 16)
    dx, dweights, dparams = backward(torch.randn(3, 16), x, weights, experts, params, needs)
    assert [t.numel() > 0 for t in (dx, dweights, *dparams)] == needs
