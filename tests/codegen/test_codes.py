"""C++ kernels that read matrices kept as codes, against the twin on the same codes and scales.

Every case is one build, so each combines several features.
"""

import pytest
import torch
from moe_reference import relative, routing

from moec.codegen import twin
from moec.codegen.tuning import Tuning
from moec.errors import CodegenError
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.runtime.backward import load_backward
from moec.runtime.cpu import load_kernel
from moec.runtime.packed import load_packed
from moec.target import Target

SPECS = {
    "rows": ExpertsSpec("bf16", codes="int8:1x0"),
    "groups": ExpertsSpec("f32", "interleaved", "nk", "kn", bias_in=True, bias_out=True, codes="int8:1x16"),
    "columns": ExpertsSpec("f32", "concat", "kn", "nk", stacked=False, codes="int8:1x0"),
    "whole": ExpertsSpec("bf16", "separate", "nk", "nk", stacked=False, codes="fp8:0x0"),
    "blocks": ExpertsSpec("f32", "concat", "nk", "kn", bias_in=True, weight_on="input", codes="fp8:5x7"),
    "blocks_kn": ExpertsSpec("f16", "none", "kn", "kn", "gelu(a)", codes="fp8:8x8"),
    "widened": ExpertsSpec("f32", "concat", "nk", "kn", bias_in=True, codes="bf16"),
}
LIMITS = {"f32": 2e-6, "bf16": 1.2e-2, "f16": 2e-3}


def spec_of(name):
    return KernelSpec(SPECS[name], None, SPECS[name].dtype)


def numbers(s, group, shape):
    """What a group may hold: codes over their whole range, zeros and the smallest among them."""
    kind = s.stored(group)
    if group.startswith("scale_"):
        return torch.rand(shape) * (2.0 if kind == "f32" else 1.0) / {"int8": 127, "fp8": 448}[s.coding.element]
    if kind == "int8":
        return torch.randint(-128, 128, shape, dtype=torch.int8)
    if kind == "fp8":
        bits = torch.randint(0, 256, shape, dtype=torch.uint8)
        return bits.where(bits & 0x7F != 0x7F, 0).view(torch.float8_e4m3fn)  # no NaN
    return (torch.randn(shape) * 0.2).to(DTYPES[kind])


def make(s, H, F, E):
    count, lead = (1, (E,)) if s.stacked else (E, ())
    return [numbers(s, g, (*lead, *s.stored_shape(g, H, F))) for g in s.param_groups for _ in range(count)]


def check(spec, kernel, shapes, tokens):
    s = spec.experts
    for H, F, E, k in shapes:
        params = make(s, H, F, E)
        for T, kind in tokens:
            weights, experts = routing(kind, T, E, k)
            x = torch.randn(T, H).to(DTYPES[s.dtype])
            got, want = kernel.experts(x, weights, experts, params), twin.experts(x, weights, experts, params, spec)
            assert kernel.takes(x, params)
            assert got.dtype == want.dtype
            assert torch.isfinite(got).all()
            assert relative(got, want) < LIMITS[s.dtype], (H, F, E, k, T, kind)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_kernel_equals_twin(name):
    spec = spec_of(name)
    tokens = ((0, "random"), (1, "random"), (7, "sentinels"), (13, "same"), (90, "same"), (200, "random"))
    check(spec, load_kernel(str(spec), None), ((67, 37, 8, 2), (32, 48, 4, 4), (5, 3, 3, 1)), tokens)


@pytest.mark.parametrize("name", ["groups", "blocks_kn"])
def test_narrow_blocks_and_no_streaming(name):
    """K cut in more blocks than sizes alone would, groups of scales that straddle them, and all rows packed."""
    spec = spec_of(name)
    kernel = load_kernel(str(spec), None)
    for few in ((0, 0), (4, 4)):
        cut = kernel.tuned(Tuning(few, (16, 16), (32, 32), 48, 10, (12, 12), 64))
        check(spec, cut, ((67, 37, 4, 2),), ((13, "random"), (70, "same")))


def test_other_lanes():
    """16 lanes, emulated; bf16 is not multiplied in pairs where its weights are codes."""
    spec = spec_of("whole")
    kernel = load_kernel(str(spec), None, Target.host().emulating("avx512_bf16"))
    check(spec, kernel, ((67, 37, 8, 2),), ((7, "sentinels"), (90, "same")))


def test_every_code_of_fp8_stands_for_its_number():
    """One token a code: experts that hand on x times the code, NaN for the two codes that are NaN."""
    spec = KernelSpec(ExpertsSpec("f32", "none", activation="a", codes="fp8:0x0"))
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    one = torch.ones(256, 1, 1)
    params = [codes.view(256, 1, 1), one.to(torch.float8_e4m3fn), one, one]
    y = load_kernel(str(spec), None).experts(torch.ones(256, 1), torch.ones(256, 1), torch.arange(256)[:, None], params)
    assert torch.equal(y[:, 0].nan_to_num(999.0), codes.float().nan_to_num(999.0))


def test_scales_that_are_no_rows_are_copied():
    """Scales of any strides: columns of a larger tensor, and one number for all experts."""
    spec = spec_of("rows")
    H, F, E, k = 24, 16, 4, 2
    params = make(spec.experts, H, F, E)
    at = spec.experts.param_groups.index("scale_ab")
    params[at] = torch.rand(E, 2 * F, 3)[:, :, 1:2] / 127
    params[-1] = torch.full((1, 1, 1), 0.01).expand(E, H, 1)
    weights, experts = routing("random", 13, E, k)
    x = torch.randn(13, H).bfloat16()
    got = load_kernel(str(spec), None).experts(x, weights, experts, params)
    assert relative(got, twin.experts(x, weights, experts, params, spec)) < LIMITS["bf16"]


def test_what_has_no_kernel_says_so():
    spec = str(spec_of("rows"))
    with pytest.raises(CodegenError, match=r"gradients of experts that are kept as int8:1x0"):
        load_backward(spec)
    with pytest.raises(CodegenError, match=r"kept as int8:1x0 are read as they are"):
        load_packed(spec, "packed", None)
    params = make(SPECS["rows"], 8, 8, 2)
    assert not load_kernel(spec, None).takes(torch.randn(3, 8), [p.float() for p in params])
