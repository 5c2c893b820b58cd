"""Kernels over packed copies of the weights against the twin on the weights that the copy stands for."""

import pytest
import torch
from moe_reference import CLAMPED, layer, make_params, relative, routing

from moec.codegen import twin
from moec.codegen.pack import pack
from moec.codegen.storage import Storage, storage_of
from moec.errors import CodegenError
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.runtime.copies import copies_made
from moec.runtime.packed import load_packed
from moec.target import Target

SPECS = {
    "swiglu": KernelSpec(ExpertsSpec(), RouterSpec(renormalize=True)),
    "oss_bf16": KernelSpec(
        ExpertsSpec("bf16", "interleaved", "kn", "kn", CLAMPED, bias_in=True, bias_out=True), None, "bf16"
    ),
    "apart_f16": KernelSpec(
        ExpertsSpec("f16", "separate", "nk", "kn", "mul(gelu(a), b)", bias_in=True, stacked=False), None, "f16"
    ),
    "plain": KernelSpec(ExpertsSpec("f32", "none", "kn", "nk", "mul(relu(a), relu(a))", weight_on="input")),
}
LIMITS = {"f32": 2e-6, "bf16": 1.2e-2, "f16": 2e-3}
CASES = [
    ("swiglu", "packed"), ("swiglu", "bf16"), ("swiglu", "int8"), ("oss_bf16", "packed"), ("oss_bf16", "int8:16"),
    ("apart_f16", "packed"), ("plain", "int8:7"),
]  # fmt: skip


def rounded(params, spec, weights):
    """The parameters as the copy holds them, in fp32: what the kernel's result is to be compared with."""
    if weights == "packed":
        return [p.float() for p in params]
    group = int(weights.partition(":")[2] or 0)
    layouts = {"out": spec.experts.layout_out, "ab": spec.experts.layout_in}
    layouts |= {"a": spec.experts.layout_in, "b": spec.experts.layout_in}
    count = 1 if spec.experts.stacked else len(params) // len(spec.experts.param_groups)
    found = []
    for i, p in enumerate(params):
        layout = layouts.get(spec.experts.param_groups[i // count])
        if layout is None:
            found.append(p.float())
            continue
        matrix = p.float() if layout == "nk" else p.float().transpose(-1, -2)
        if weights == "bf16":
            matrix = matrix.bfloat16().float()
        else:
            parts = matrix.split(group or matrix.shape[-1], -1)
            scales = [part.abs().amax(-1, keepdim=True) / 127 for part in parts]
            matrix = torch.cat([(q / s.clamp(min=1e-38)).round() * s for q, s in zip(parts, scales, strict=True)], -1)
        found.append(matrix if layout == "nk" else matrix.transpose(-1, -2))
    return found


def check(spec, weights, kernel):
    for H, F, E, k in ((67, 37, 8, 2), (32, 48, 4, 4), (1, 1, 3, 1)):
        params = make_params(spec.experts, H, F, E)
        reference = rounded(params, spec, weights)
        for T, kind in ((0, "random"), (1, "random"), (7, "sentinels"), (13, "same"), (200, "random"), (90, "same")):
            w, experts = routing(kind, T, E, k)
            x = torch.randn(T, H).to(DTYPES[spec.experts.dtype])
            got = kernel.experts(x, w, experts, params)
            f32 = KernelSpec.parse(str(spec).replace("dtype=bf16; ", "").replace("dtype=f16; ", ""))
            want = twin.experts(x.float(), w, experts, reference, f32)
            assert got.dtype == DTYPES[spec.y_dtype]
            assert torch.isfinite(got.float()).all()
            assert relative(got, want) < LIMITS[spec.experts.dtype], (H, T, kind)


@pytest.mark.parametrize(("name", "weights"), CASES)
def test_results_are_those_of_the_copy(name, weights):
    check(SPECS[name], weights, load_packed(str(SPECS[name]), weights, None))


@pytest.mark.parametrize(("isa", "weights"), [("avx512_bf16", "packed"), ("amx_bf16", "packed"), ("neon", "int8:16")])
def test_other_vectors_and_pairs(isa, weights):
    spec = KernelSpec(ExpertsSpec("bf16"), None)
    check(spec, weights, load_packed(str(spec), weights, None, Target.host().emulating(isa)))


def test_the_router_runs_in_the_same_region():
    spec = SPECS["swiglu"]
    kernel, params = load_packed(str(spec), "packed", torch.float32), make_params(spec.experts, 64, 40, 6)
    router, x = [torch.randn(6, 64) * 0.1], torch.randn(33, 64)
    y, logits, weights, experts = kernel.moe(x, router, params, 2)
    want = twin.route(x, router, 2, spec.router)
    assert torch.equal(experts, want[2])
    assert torch.allclose(logits, want[0], atol=1e-5)
    assert relative(y, layer(x, weights, experts, params, spec)) < 2e-6


def test_the_copy_says_its_bytes_and_its_error():
    spec = SPECS["swiglu"]
    params = [torch.randn(4, 256, 512), torch.randn(4, 512, 128)]
    stored = sum(p.numel() for p in params)
    sizes = {}
    for weights in ("packed", "bf16", "int8", "int8:128"):
        storage = storage_of(weights, spec.experts, Target.host())
        packed = pack(params, spec, storage, 16)
        sizes[weights] = packed.bytes / stored
        error = [relative(a, b) for a, b in zip(rounded(params, spec, weights), params, strict=True)]
        assert packed.error == pytest.approx(
            (sum(e * e * p.numel() for e, p in zip(error, params, strict=True)) / stored) ** 0.5, rel=0.02
        )
    assert sizes["packed"] == 4
    assert sizes["bf16"] == 2
    assert 1 < sizes["int8"] < sizes["int8:128"] < 1.04


def test_a_channel_of_zeros_and_one_of_huge_numbers():
    spec = KernelSpec(ExpertsSpec(gate="none", activation="relu(a)"))
    params = make_params(spec.experts, 32, 16, 2)
    params[0][:, 3] = 0
    params[0][:, 5] = 1e30
    kernel = load_packed(str(spec), "int8", None)
    x, (w, experts) = torch.rand(5, 32), routing("random", 5, 2, 1)
    want = twin.experts(x, w, experts, rounded(params, spec, "int8"), spec)
    got = kernel.experts(x, w, experts, params)
    assert relative(got.nan_to_num(), want.nan_to_num()) < 1e-5


def test_storages_that_no_kernel_has_are_refused():
    with pytest.raises(CodegenError, match="int4"):
        storage_of("int4", ExpertsSpec(), Target.host())
    assert storage_of("bf16", ExpertsSpec("f16"), Target.host()) == Storage("f16")


def test_copies_are_made_once_and_again_after_a_change():
    spec = SPECS["swiglu"]
    kernel = load_packed(str(spec), "packed", None)
    params = [p.contiguous() for p in make_params(spec.experts, 32, 16, 4)]
    w, experts = routing("random", 9, 4, 2)
    x = torch.randn(9, 32)

    def run():
        return relative(kernel.experts(x, w, experts, params), twin.experts(x, w, experts, params, spec))

    with copies_made() as copies:
        assert run() < 2e-6
        assert run() < 2e-6
        assert len(copies) == 1
        assert "0.0 MB of weights copied" in str(copies[-1])
        with torch.no_grad():
            params[1].mul_(2)
        assert run() < 2e-6
        params[0] = params[0].clone()
        assert run() < 2e-6
        assert len(copies) == 3
        assert kernel.tuned(kernel.tuning).experts(x, w, experts, params).shape == x.shape
        assert len(copies) == 3  # tuned kernels share the copies


def test_freed_parameters_are_not_taken_for_new_ones_at_their_place():
    spec = KernelSpec(ExpertsSpec(gate="none", activation="relu(a)"))
    kernel = load_packed(str(spec), "packed", None)
    w, experts = routing("random", 9, 4, 2)
    x = torch.randn(9, 32)
    for seed in range(6):
        params = [p.contiguous() for p in make_params(spec.experts, 32, 16, 4, seed=seed)]
        got, want = kernel.experts(x, w, experts, params), twin.experts(x, w, experts, params, spec)
        assert relative(got, want) < 2e-6
        del params
    assert len(kernel._copies.held) <= 6
    params = [p.contiguous() for p in make_params(spec.experts, 64, 16, 4)]
    kernel.experts(torch.randn(9, 64), w, experts, params)
    assert len(kernel._copies.held) <= 2  # what was freed is let go of
