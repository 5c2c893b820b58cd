"""The eager twins against float64 loops: values, routing, gradients."""

import itertools

import pytest
import torch
from moe_reference import PHI, layer, make_params, relative, routing

from moec.codegen import twin
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec

COMBINATIONS = [
    (gate, layout, stacked, bias, on)
    for gate, layout, stacked, bias, on in itertools.product(
        ("none", "concat", "interleaved", "separate"), ("nk", "kn"), (True, False), (True, False), ("output", "input")
    )
]


def make(gate, layout, stacked, bias, on, dtype="f32"):
    phi = "gelu_tanh(a)" if gate == "none" else "mul(silu(a), b)"
    other = "kn" if layout == "nk" and stacked else layout
    return KernelSpec(
        ExpertsSpec(dtype, gate, layout, other, phi, bias_in=bias, bias_out=bias, weight_on=on, stacked=stacked)
    )


@pytest.mark.parametrize(("gate", "layout", "stacked", "bias", "on"), COMBINATIONS)
def test_experts_equal_a_float64_loop(gate, layout, stacked, bias, on):
    spec = make(gate, layout, stacked, bias, on)
    params = make_params(spec.experts, 9, 6, 5)
    for T, kind in ((0, "random"), (1, "random"), (13, "same"), (13, "sentinels")):
        weights, experts = routing(kind, T, 5, 2)
        x = torch.randn(T, 9)
        y = twin.experts(x, weights, experts, params, spec)
        assert y.dtype == torch.float32
        assert relative(y, layer(x, weights, experts, params, spec)) < 2e-6


@pytest.mark.parametrize("phi", sorted(PHI))
def test_activations_and_bf16(phi):
    gate = "concat" if phi != "gelu_tanh(a)" and "relu" not in phi else "none"
    for dtype, limit in (("f32", 2e-6), ("bf16", 2e-2), ("f16", 3e-3)):
        spec = KernelSpec(ExpertsSpec(dtype, gate=gate, activation=phi), y_dtype=dtype)
        params = make_params(spec.experts, 16, 12, 4)
        weights, experts = routing("random", 7, 4, 4)
        x = torch.randn(7, 16).to(params[0].dtype)
        y = twin.experts(x, weights, experts, params, spec)
        assert y.dtype == params[0].dtype
        assert relative(y, layer(x, weights, experts, params, spec)) < limit


@pytest.mark.parametrize(("gate", "layout", "stacked", "bias", "on"), COMBINATIONS)
def test_gradients_equal_autograd_in_float64(gate, layout, stacked, bias, on):
    spec = make(gate, layout, stacked, bias, on)
    params = [p.clone().requires_grad_() for p in make_params(spec.experts, 8, 5, 4, dtype=torch.float64)]
    weights, experts = routing("random", 7, 3, 2)  # expert 3 is idle
    x = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    weights = weights.double().requires_grad_()
    y = layer(x, weights, experts, params, spec)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, weights, *params], g, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        dx, dw, dparams = twin.experts_backward(g, x, weights, experts, params, spec, [True] * (2 + len(params)))
    for got, want in zip([dx, dw, *dparams], expected, strict=True):
        assert got.shape == want.shape
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-9)
    if stacked:
        assert all(float(d[3].abs().max()) == 0.0 for d in dparams)


def test_gradients_that_are_not_needed_are_empty():
    spec = make("concat", "nk", True, True, "output")
    params = make_params(spec.experts, 8, 5, 4)
    weights, experts = routing("random", 7, 4, 2)
    needs = [False, False, False, True, False, False]
    x = torch.randn(7, 8)
    dx, dw, dparams = twin.experts_backward(torch.randn(7, 8), x, weights, experts, params, spec, needs)
    assert [t.numel() > 0 for t in (dx, dw, *dparams)] == needs


def test_half_precision_gradients_keep_dtype_and_shape():
    spec = make("interleaved", "kn", True, True, "output", "bf16")
    params = make_params(spec.experts, 8, 5, 4)
    weights, experts = routing("random", 33, 4, 2)
    x, g = torch.randn(33, 8).bfloat16(), torch.randn(33, 8).bfloat16()
    wide = [p.double().requires_grad_() for p in params]
    want = torch.autograd.grad(layer(x.double(), weights, experts, wide, spec), wide, g.double())
    _, _, dparams = twin.experts_backward(g, x, weights, experts, params, spec, [True] * 6)
    for got, expected in zip(dparams, want, strict=True):
        assert got.dtype == torch.bfloat16
        assert relative(got, expected) < 2e-2


def test_route_spelled_out():
    x, w = torch.randn(13, 6), torch.randn(8, 6)
    bias = torch.randn(8)
    spec = RouterSpec(score="sigmoid(logits)", selection_bias=True, groups=4, topk_group=2, renormalize=True, scale=2.5)
    logits, weights, experts = twin.route(x, [w, bias], 3, spec)
    score = torch.sigmoid(x @ w.t())
    for t in range(13):
        choice = score[t] + bias
        groups = choice.view(4, 2).sum(-1).topk(2).indices.tolist()
        allowed = [e for e in range(8) if e // 2 in groups]
        want = sorted(allowed, key=lambda e: -choice[e])[:3]
        assert experts[t].tolist() == want
        expected = score[t, want] / score[t, want].sum() * 2.5
        assert torch.allclose(weights[t], expected, atol=1e-6)
    assert torch.allclose(logits, x @ w.t(), atol=1e-5)


def test_route_in_bf16_is_the_eager_spelling():
    x, w = torch.randn(50, 32).bfloat16(), torch.randn(16, 32).bfloat16()
    spec = RouterSpec(compute="bf16", renormalize=True, weight_dtype="bf16")
    logits, weights, experts = twin.route(x, [w], 4, spec)
    want_logits = torch.nn.functional.linear(x, w)
    p = torch.softmax(want_logits, -1, dtype=torch.float32)
    top, index = torch.topk(p, 4)
    assert torch.equal(logits, want_logits)
    assert torch.equal(experts, index)
    assert torch.equal(weights, (top / top.sum(-1, keepdim=True)).bfloat16())
