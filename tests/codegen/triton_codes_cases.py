"""Triton kernels over codes, against the twin on the weights that the codes stand for.

In the interpreter or on a GPU (elsewhere.py). Run by test_triton.py in its own process.
"""

import dataclasses

import pytest
import torch
from elsewhere import DEVICE, There, moved
from moe_reference import layer, make_params, relative, routing
from quick_interpreter import quick  # noqa: F401
from triton_cases import DECODE, FORMS, LIMITS, SORTED, in_turn, with_gate

import moec.runtime.ops  # noqa: F401  # defines the ops
from moec.codegen import twin
from moec.codegen.codes import decoded, encoded
from moec.codegen.encode import encode
from moec.codegen.plan import Sizes
from moec.ir.coding import LARGEST, Coding
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.runtime.coded import CodedKernel, coded_kernel
from moec.runtime.copies import copies_made
from moec.runtime.triton import TritonKernel, load_triton


def coded(spec, weights, config=None):
    kernel = coded_kernel(TritonKernel(spec, DEVICE), weights, [])
    assert isinstance(kernel, CodedKernel)
    return There(configured(kernel, config) if config else kernel)


def configured(kernel, config):
    """`kernel` with one configuration for all sizes; how fp8 is converted stays what the device can."""
    native = kernel.config_for(Sizes(1, 64, 64, 2, 1)).native_fp8
    kernel.config_for = lambda sizes: dataclasses.replace(config, native_fp8=native)
    return kernel


def stands_for(params, spec, of):
    """The weights that codes stand for, in fp32, and the spec of experts that have them."""
    copy, coding = encode(params, spec, of).tensors, of.experts.coding
    changes = {"dtype": "f32", "layout_in": "nk", "layout_out": "nk", "stacked": True}
    plain = dataclasses.replace(spec.experts, **changes)
    found = []
    for group in plain.param_groups:
        if group.startswith("bias_"):
            found.append(copy[group].float())
            continue
        scales = copy.get(f"scale_{group}", torch.ones(len(copy[group]), 1, 1))
        found.append(torch.stack([decoded(c, s, coding) for c, s in zip(copy[group], scales, strict=True)]))
    return found, KernelSpec(plain, None, "f32")


def check(spec, weights, config, T, H, F, E, k, kind="sentinels"):
    params = make_params(spec.experts, H, F, E)
    kernel = coded(spec, weights, config)
    w, experts = routing(kind, T, E, k)
    x = torch.randn(T, H).to(DTYPES[spec.experts.dtype])
    y = kernel.experts(x, w, experts, params)
    assert y.dtype == DTYPES[spec.y_dtype]
    reference, plain = stands_for(params, spec, kernel.spec)
    assert relative(y, layer(x, w, experts, reference, plain)) < LIMITS[spec.experts.dtype]


CASES = [
    (("concat", "nk", True, True, "output"), "f32", "int8:32", SORTED),
    (("interleaved", "kn", True, True, "output"), "bf16", "fp8:16", SORTED),
    (("interleaved", "kn", True, True, "output"), "bf16", "int8", DECODE),
    (("separate", "nk", False, False, "input"), "bf16", "int8", SORTED),
    (("separate", "nk", False, False, "input"), "bf16", "fp8:16", DECODE),
    (("none", "kn", False, True, "output"), "f16", "fp8", SORTED),
    (("concat", "nk", True, True, "output"), "bf16", "fp8", DECODE),
]
WEIGHTS = ["int8", "int8:32", "fp8", "fp8:16"]


@pytest.mark.parametrize(("form", "dtype", "weights", "config"), CASES, ids=lambda v: getattr(v, "variant", str(v)))
def test_experts(form, dtype, weights, config):
    check(with_gate(*form, dtype), weights, config, 5, 36, 24, 3, 2)


def test_bf16_of_fp32_weights():
    check(with_gate("concat", "kn", True, True, "output"), "bf16", SORTED, 5, 40, 24, 3, 2)
    half = load_triton(str(with_gate("concat", "kn", True, True, "output", "bf16")), DEVICE)
    assert coded_kernel(half, "bf16", []) is half


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "config", "weights", "dtype"), in_turn(FORMS, (SORTED, DECODE), (*WEIGHTS, "int8:128", "fp8:128"))
)
def test_all_forms(form, config, weights, dtype):
    for T, kind in ((1, "random"), (13, "same"), (7, "sentinels")):
        check(with_gate(*form, dtype), weights, config, T, 161, 48, 4, 2, kind)


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("T", [1, 7, 13, 200])
@pytest.mark.parametrize(("E", "k"), [(1, 1), (3, 1), (3, 3), (16, 16), (512, 1), (512, 16)])
def test_all_sizes(T, E, k, weights):
    check(with_gate("concat", "nk", True, True, "output", "bf16"), weights, None, T, 40, 36, E, k)


def test_every_fp8_number_is_read_as_it_is():
    """An identity of experts: the rows of the second matrix are all 256 numbers."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn)
    finite = numbers[numbers.float().isfinite()]
    spec = KernelSpec(ExpertsSpec("bf16", "none", activation="mul(a, 1.0)", codes="fp8"), None, "bf16")
    first = torch.eye(16, 256).to(torch.float8_e4m3fn)[None]
    second = torch.zeros(1, 256, 16, dtype=torch.float8_e4m3fn)
    second[0, : len(finite), 0] = finite
    x = torch.eye(256)[:1].bfloat16()
    one = (torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    scales = [torch.ones(1, 1, 1), torch.full((1, 1, 1), 0.5)]
    for config in (SORTED, DECODE):
        kernel = There(configured(TritonKernel(spec, DEVICE), config))
        y = kernel.experts(x, *one, [first, second, *scales])
        assert torch.equal(y[0, : len(finite)].float(), finite.float() / 2)
    nan = torch.full((1, 256, 16), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert There(load_triton(str(spec), DEVICE)).experts(x, *one, [first, nan, *scales]).isnan().all()


def test_parameters_that_are_codes_already():
    """A model's own fp8 parameters with scales of blocks, in both layouts, stacked or not: as the twin reads them."""
    for layout, stacked, config in (("kn", True, SORTED), ("nk", False, DECODE)):
        wide = ExpertsSpec("bf16", "concat", layout, layout, stacked=True)
        params = make_params(wide, 36, 20, 3)
        spec = KernelSpec(dataclasses.replace(wide, codes="fp8:16", stacked=stacked), None, "bf16")
        own = list(
            encode(params, KernelSpec(wide, None, "bf16"), coded(KernelSpec(wide), "fp8:16").spec).tensors.values()
        )
        own = own if layout == "nk" else [t.transpose(1, 2).contiguous() for t in own]
        own = own if stacked else [t.contiguous() for group in own for t in group.unbind(0)]
        w, experts = routing("sentinels", 3, 3, 2)
        x = torch.randn(3, 36).bfloat16()
        kernel = There(configured(TritonKernel(spec, DEVICE), config))
        assert kernel.takes(x, own)
        got = kernel.experts(x, w, experts, own)
        assert relative(got, twin.experts(x, w, experts, own, spec)) < LIMITS["bf16"]


def test_routers_are_as_before():
    spec = KernelSpec(ExpertsSpec("bf16"), RouterSpec(renormalize=True), "bf16")
    params = make_params(spec.experts, 32, 16, 8)
    x, w = torch.randn(5, 32).bfloat16(), torch.randn(8, 32).bfloat16()
    plain, other = There(load_triton(str(spec), DEVICE)), coded(spec, "int8")
    y, logits, weights, experts = plain.moe(x, [w], params, 2)
    y8, *routed = other.moe(x, [w], params, 2)
    assert all(torch.equal(a, b) for a, b in zip((logits, weights, experts), routed, strict=True))
    assert 0 < relative(y8, y) < 0.05


def test_the_option_copies_once_and_says_how_far_the_copy_is():
    spec = str(KernelSpec(ExpertsSpec("bf16"), None, "bf16"))
    params = [moved(p) for p in make_params(ExpertsSpec("bf16"), 64, 32, 4)]
    w, experts = map(moved, routing("random", 5, 4, 2))
    x = moved(torch.randn(5, 64).bfloat16())
    with copies_made() as copies:
        y = [torch.ops.moec.experts(x, w, experts, params, spec, "triton weights=fp8:32") for _ in range(2)]
    assert torch.equal(*y)
    (record,) = copies
    assert (record.weights, record.experts) == ("fp8:32", 4)
    assert record.packed_bytes == record.stored_bytes // 2 + 4 * 4 * (2 * 2 + 1 * 2)
    assert 0.01 < record.error < 0.05
    params[0].mul_(2)
    with copies_made() as copies:
        torch.ops.moec.experts(x, w, experts, params, spec, "triton weights=fp8:32")
    assert len(copies) == 1


@pytest.mark.parametrize(
    ("weights", "message"), [("int8:20", "a multiple of 16"), ("packed", "no order of their own for weights")]
)
def test_what_triton_does_not_store_is_read_as_it_is_with_a_warning(weights, message):
    spec = str(KernelSpec(ExpertsSpec("bf16"), None, "bf16"))
    params = [moved(p) for p in make_params(ExpertsSpec("bf16"), 32, 16, 2)]
    w, experts = map(moved, routing("random", 3, 2, 1))
    x = moved(torch.randn(3, 32).bfloat16())
    with pytest.warns(RuntimeWarning, match=message):
        y = torch.ops.moec.experts(x, w, experts, params, spec, f"triton weights={weights}")
    assert torch.equal(y, torch.ops.moec.experts(x, w, experts, params, spec, "triton"))


@pytest.mark.parametrize(
    "coding", [Coding("int8", 1), Coding("int8", 1, 7), Coding("fp8"), Coding("fp8", 5, 3)], ids=str
)
def test_codes(coding):
    matrix = torch.randn(13, 20)
    matrix[3] = 0
    codes, scales = encoded(matrix, coding)
    assert scales.shape == coding.scale_shape(13, 20)
    assert codes.float().abs().max() == LARGEST[coding.element]
    back = decoded(codes, scales, coding)
    assert torch.equal(back[3], matrix[3])
    assert float((back - matrix).norm() / matrix.norm()) < (0.01 if coding.element == "int8" else 0.04)
    matrix[5, 5] = float("inf")
    assert decoded(*encoded(matrix, coding), coding)[5, 5].isnan()
