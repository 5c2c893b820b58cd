"""C++ kernels of experts whose output has a width of its own, and of experts without an output matrix."""

import pytest
import torch
from moe_reference import PHI, layer, make_params, relative, routing

from moec.codegen import cpp, twin
from moec.codegen.tuning import Sizes
from moec.errors import CodegenError
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec, widths
from moec.runtime.backward import load_backward
from moec.runtime.cpu import load_kernel
from moec.runtime.packed import load_packed

H, F, E = 13, 24, 4
PHI_A = "gelu_tanh(a)"
SPECS = {
    "gated": (KernelSpec(ExpertsSpec(bias_in=True, bias_out=True)), (1, 17, 40)),
    "mlp_bf16": (
        KernelSpec(
            ExpertsSpec("bf16", "none", "kn", "kn", PHI_A, bias_out=True, weight_on="input", stacked=False),
            y_dtype="bf16",
        ),
        (1, 3),
    ),
    "linear": (KernelSpec(ExpertsSpec(gate="none", activation="a", bias_in=True, out=False)), (1, 3, 17)),
    "glu_bf16": (
        KernelSpec(
            ExpertsSpec("bf16", "concat", "kn", weight_on="input", stacked=False, out=False),
            y_dtype="bf16",
        ),
        (17,),
    ),
}
CASES = [(name, O) for name, (_, widths_of) in SPECS.items() for O in widths_of]
LIMITS = {"f32": 2e-6, "bf16": 1e-2}


@pytest.fixture(autouse=True)
def linear(monkeypatch):
    monkeypatch.setitem(PHI, "a", lambda a, b: a)


def made(name, O, T, kind):
    spec = SPECS[name][0]
    params = make_params(spec.experts, H, F if spec.experts.out else O, E, O=O)
    weights, experts = routing(kind, T, E, 2)
    return spec, torch.randn(T, H).to(params[0].dtype), weights, experts, params


@pytest.mark.parametrize(("name", "O"), CASES)
def test_forward(name, O):
    for T, kind in ((0, "random"), (1, "random"), (7, "sentinels"), (60, "same"), (13, "random")):
        spec, x, weights, experts, params = made(name, O, T, kind)
        y = load_kernel(str(spec), None).experts(x, weights, experts, params)
        assert y.shape == (T, O)
        assert y.dtype == DTYPES[spec.y_dtype]
        assert relative(y, layer(x, weights, experts, params, spec)) < LIMITS[spec.experts.dtype] or T == 0


@pytest.mark.parametrize(("name", "O"), CASES)
def test_gradients(name, O):
    for T, kind, save in ((1, "random", False), (7, "sentinels", True), (200, "same", False), (13, "random", True)):
        spec, x, weights, experts, params = made(name, O, T, kind)
        wide, s = [p.double() for p in params], spec.experts
        g = torch.randn(T, O).to(x.dtype)
        saved = None
        if save:
            saved = torch.zeros(T * 2, s.ab_views * widths(s, params)[1], dtype=x.dtype)
            load_kernel(str(spec), None).experts(x, weights, experts, params, saved)
        needs = [True] * (2 + len(params))
        dx, dweights, dparams = load_backward(str(spec))(g, x, weights, experts, params, saved, needs)
        want = twin.experts_backward(g.double(), x.double(), weights.double(), experts, wide, spec, needs)
        low = twin.experts_backward(g, x, weights, experts, params, spec, needs)
        there = (experts >= 0) & (experts < E)
        pairs = [(dx, want[0], low[0]), (dweights[there], want[1][there], low[1][there])]
        for got, exact, eager in [*pairs, *zip(dparams, want[2], low[2], strict=True)]:
            assert got.shape == exact.shape
            assert relative(got, exact) < max(2 * LIMITS[s.dtype], 3 * relative(eager, exact))


@pytest.mark.parametrize("name", ["gated", "linear"])
def test_packed_copies(name):
    O = SPECS[name][1][-1]
    spec, x, weights, experts, params = made(name, O, 13, "random")
    y = load_packed(str(spec), "packed", None).experts(x, weights, experts, params)
    assert relative(y, layer(x, weights, experts, params, spec)) < LIMITS["f32"]


def test_a_missing_output_matrix_has_no_bias():
    spec = KernelSpec(ExpertsSpec(gate="none", activation="a", bias_out=True, out=False))
    with pytest.raises(CodegenError, match="biases in bias_in"):
        cpp.check(spec)


def test_sizes_without_an_output_width_are_as_wide_as_x():
    assert Sizes(1, 2, 3, 4, 1) == Sizes(1, 2, 3, 4, 1, 2)
    assert widths(ExpertsSpec(out=False), [torch.empty(4, 6, 2)]) == (2, 3, 3)
    assert widths(ExpertsSpec(layout_out="kn"), [torch.empty(4, 6, 2), torch.empty(4, 3, 5)]) == (2, 3, 5)
    assert KernelSpec.parse(str(SPECS["linear"][0])) == SPECS["linear"][0]
