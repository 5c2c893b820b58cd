"""Generated C++ kernels against the eager twin, over gates, layouts, dtypes, biases, activations and routers.

Every case is one build of about two seconds, so each combines several features; together they cover all values.
"""

from dataclasses import replace

import pytest
import torch
from moe_reference import CLAMPED, layer, make_params, relative, routing

from moec.codegen import twin
from moec.codegen.tuning import Tuning
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.runtime.cpu import load_kernel
from moec.target import Target

SPECS = {
    "swiglu": KernelSpec(ExpertsSpec(), RouterSpec(renormalize=True)),
    "swiglu_bf16": KernelSpec(
        ExpertsSpec("bf16"), RouterSpec("bf16", renormalize=True, weight_dtype="bf16"), y_dtype="bf16"
    ),
    "oss_bf16": KernelSpec(
        ExpertsSpec("bf16", "interleaved", "kn", "kn", CLAMPED, bias_in=True, bias_out=True),
        RouterSpec("bf16", bias=True, score="logits", score_dtype="bf16", softmax_over_k=True, weight_dtype="bf16"),
        y_dtype="bf16",
    ),
    "biases_in_f32": KernelSpec(
        ExpertsSpec("bf16", "concat", "kn", "nk", CLAMPED, bias_in=True, bias_out=True, stacked=False, biases="f32"),
        RouterSpec("bf16", weight_dtype="bf16"),
    ),
    "oss_f32": KernelSpec(
        ExpertsSpec("f32", "interleaved", "nk", "kn", CLAMPED, bias_in=True, bias_out=True, stacked=False),
        RouterSpec(bias=True, score="logits", softmax_over_k=True),
    ),
    "grouped_f16": KernelSpec(
        ExpertsSpec("f16", "separate", "nk", "nk", "mul(gelu(a), b)", bias_in=True, stacked=False),
        RouterSpec(score="sigmoid(logits)", selection_bias=True, groups=4, topk_group=2, renormalize=True, eps=1e-9,
                   scale=2.0),
        y_dtype="f16",
    ),
    "plain_kn": KernelSpec(
        ExpertsSpec("f32", "none", "kn", "nk", "mul(relu(a), relu(a))", bias_out=True, weight_on="input"),
        RouterSpec(score="sqrt(softplus(logits))", groups=2, topk_group=1, group_score="max", weight_from="choice",
                   masked_value=0.0),
    ),
    "plain_f16_kn": KernelSpec(
        ExpertsSpec("f16", "none", "kn", "kn", "gelu_tanh(a)", bias_in=True, stacked=False),
        RouterSpec(score="mul(round_bf16(tanh(softplus(logits))), 0.3)", score_dtype="bf16",
                   choose_by="logits", clamp_min=0.5, renormalize=True,
                   sorted=False),
        y_dtype="f32",
    ),
    "on_input_bf16": KernelSpec(
        ExpertsSpec("bf16", "separate", "kn", "nk", "mul(softplus(a), tanh(b))", weight_on="input"),
        RouterSpec("f32", score="sqrt(softmax)", softmax_of="mul(tanh(div(logits, 3.0)), 3.0)", weight_dtype="bf16"),
        y_dtype="bf16",
    ),
}  # fmt: skip
LIMITS = {"f32": 2e-6, "bf16": 1.2e-2, "f16": 2e-3}


def router_tensors(spec, H, E, dtype):
    r = spec.router
    tensors = [(torch.randn(E, H) * H**-0.5).to(dtype)]
    return tensors + ([torch.randn(E)] if r.bias else []) + ([torch.rand(E)] if r.selection_bias else [])


def kernel_for(spec, target=None):
    dtype = DTYPES[spec.experts.dtype]
    return load_kernel(str(spec), dtype, target)


def close(got, want, dtype):
    assert got.dtype == want.dtype
    assert torch.isfinite(got.float()).all()
    assert relative(got, want) < LIMITS[dtype]


def check_experts(spec, kernel):
    dtype = spec.experts.dtype
    for H, F, E, k in ((67, 37, 8, 2), (32, 48, 4, 4), (1, 1, 3, 1)):
        params = make_params(spec.experts, H, F, E)
        for T, kind in ((0, "random"), (1, "random"), (7, "sentinels"), (13, "same"), (200, "random"), (90, "same")):
            weights, experts = routing(kind, T, E, k)
            x = torch.randn(T, H).to(DTYPES[dtype])
            want = twin.experts(x, weights, experts, params, spec)
            close(kernel.experts(x, weights, experts, params), want, dtype)


def check_moe(spec, kernel):
    dtype = spec.experts.dtype
    for H, F, E, k in ((67, 37, 8, 2), (32, 16, 72, 1), (16, 8, 8, 4)):
        params = make_params(spec.experts, H, F, E)
        router = router_tensors(spec, H, E, DTYPES[dtype])
        selection = router[-1:] if spec.router.selection_bias else []
        for T in (0, 1, 13, 200):
            x = torch.randn(T, 2 * H).to(DTYPES[dtype])[:, ::2]
            y, logits, weights, experts = kernel.moe(x, router, params, k)
            close(logits, twin.route(x, router, k, spec.router)[0], spec.router.compute)
            # Near-ties of logits may fall either way, so the choice is checked on the kernel's own.
            own = [torch.eye(E).to(logits.dtype), *([torch.zeros(E)] if spec.router.bias else []), *selection]
            want_experts = twin.route(logits, own, k, spec.router)[2]
            same = (experts.sort(-1).values == want_experts.sort(-1).values).all(-1)
            assert same.float().mean() > 0.97 if T else True  # a last bit of exp may make or break a tie
            assert weights.dtype == DTYPES[spec.router.weight_dtype]
            close(y, twin.experts(x, weights, experts, params, spec), dtype)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_kernel_equals_twin(name):
    kernel = kernel_for(SPECS[name])
    check_experts(SPECS[name], kernel)
    check_moe(SPECS[name], kernel)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_routing_equals_twin_on_the_same_logits(name):
    """With an identity router the logits are x itself, exactly, so choices and weights must agree everywhere."""
    spec, E = SPECS[name], 16
    params = make_params(spec.experts, E, 3, E)
    kernel = kernel_for(spec)
    x = (torch.randint(-40, 40, (300, E)) / 8).to(DTYPES[spec.experts.dtype])  # many ties
    router = router_tensors(spec, E, E, x.dtype)
    router[0] = torch.eye(E).to(x.dtype)
    if spec.router.bias:
        router[1] = torch.randint(-4, 4, (E,)) / 8
    for k in (1, 2, 5, 8):
        _, logits, weights, experts = kernel.moe(x, router, params, k)
        want_logits, want_weights, want_experts = twin.route(x, router, k, spec.router)
        assert torch.equal(logits, want_logits)
        agree = (experts == want_experts).all(-1)
        if not spec.router.sorted:
            agree = (experts.sort(-1).values == want_experts.sort(-1).values).all(-1)
        exact = spec.router.score in ("logits", "softmax") and not spec.router.selection_bias
        assert agree.float().mean() >= (1.0 if exact else 0.95)  # a last bit of exp may make or break a tie
        gap = (weights.float() - want_weights.float())[agree].abs().max()
        assert gap < (1e-5 if spec.router.weight_dtype == spec.router.score_dtype == "f32" else 2e-2)


@pytest.mark.parametrize("name", ["swiglu_bf16", "oss_bf16"])
@pytest.mark.parametrize("isa", ["avx512_bf16", "amx_bf16"])
def test_pairs_and_tiles_by_emulation(isa, name):
    """The kernels that multiply pairs of bf16, built for this host with 16-lane vectors in several registers."""
    target = Target.host().emulating(isa)
    assert target.bf16_pairs
    kernel = kernel_for(SPECS[name], target)
    check_experts(SPECS[name], kernel)
    check_moe(SPECS[name], kernel)


def test_tiles_take_rows_from_anywhere_in_blocks_of_any_size():
    """All rows packed, none streamed; K in one block or several, with and without a part that fills no tile."""
    spec = replace(SPECS["swiglu_bf16"], router=None)
    kernel = kernel_for(spec, Target.host().emulating("amx_bf16"))
    params = make_params(spec.experts, 200, 70, 5)
    for T, kind in ((1, "random"), (64, "same"), (85, "sentinels"), (130, "random")):
        weights, experts = routing(kind, T, 5, 2)
        for x in (torch.randn(T, 200).bfloat16(), torch.randn(T, 212).bfloat16()[:, 7:207]):
            want = twin.experts(x, weights, experts, params, spec)
            for block, depth in ((192, 512), (40, 64), (17, 96), (192, 70)):
                tuning = Tuning((0, 0), (16, 16), (96, 48), block, 512, (depth, depth), 1 << 20)
                close(kernel.tuned(tuning).experts(x, weights, experts, params), want, "bf16")


def test_plain_target_equals_twin():
    kernel = kernel_for(SPECS["swiglu_bf16"], Target.host().emulating("plain"))
    check_experts(SPECS["swiglu_bf16"], kernel)


def test_against_float64_and_independent_of_threads():
    spec = SPECS["swiglu"]
    kernel, params = kernel_for(spec), make_params(spec.experts, 64, 40, 6)
    weights, experts = routing("random", 130, 6, 3)
    x = torch.randn(130, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(kernel.experts(x, weights, experts, params))
    finally:
        torch.set_num_threads(before)
    assert relative(results[0], layer(x, weights, experts, params, spec)) < 1e-6
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "text",
    [
        "few=39,39 few_cols=16,16 many_cols=64,64 row_block=192 k_few=1024 k_many=256,256 chunk=40",
        "few=0,0 few_cols=64,32 many_cols=16,48 row_block=7 k_few=16 k_many=6,10 chunk=1000",
        "few=1000,5 few_cols=128,16 many_cols=16,256 row_block=64 k_few=8 k_many=2,4 chunk=33",
    ],
)
@pytest.mark.parametrize("name", ["swiglu", "oss_bf16", "plain_kn"])
def test_tuning_changes_no_result(name, text):
    """Whatever the numbers of the plan: calls cut into chunks, rows into blocks and columns into tasks are equal."""
    spec = SPECS[name]
    kernel, params = kernel_for(spec), make_params(spec.experts, 67, 37, 4)
    tuned = kernel.tuned(Tuning.parse(text))
    for T, kind in ((1, "random"), (13, "same"), (101, "random")):
        weights, experts = routing(kind, T, 4, 2)
        x = torch.randn(T, 67).to(DTYPES[spec.experts.dtype])
        want = kernel.experts(x, weights, experts, params)
        close(tuned.experts(x, weights, experts, params), want, spec.experts.dtype)


@pytest.mark.parametrize("name", ["swiglu", "swiglu_bf16", "grouped_f16"])
def test_any_number_of_rows_of_one_expert(name):
    """Up to 45 rows: each way to stream weights, with full and partial passes of rows, and packing beyond."""
    spec = SPECS[name]
    kernel, params = kernel_for(spec), make_params(spec.experts, 67, 37, 2)
    for T in range(1, 46):
        weights, experts = routing("same", T, 2, 1)
        x = torch.randn(T, 67).to(DTYPES[spec.experts.dtype])
        close(
            kernel.experts(x, weights, experts, params),
            twin.experts(x, weights, experts, params, spec),
            spec.experts.dtype,
        )


def test_x_of_another_dtype_and_wide_experts_ids():
    spec = SPECS["swiglu_bf16"]
    kernel, params = kernel_for(spec), make_params(spec.experts, 48, 20, 4)
    weights, experts = routing("random", 20, 4, 2)
    x = torch.randn(20, 48)
    want = twin.experts(x, weights.double(), experts.int(), params, spec)
    close(kernel.experts(x, weights.double(), experts.int(), params), want, "bf16")


def test_concurrent_calls_do_not_share_workspaces():
    from concurrent.futures import ThreadPoolExecutor

    spec = SPECS["swiglu"]
    kernel, params = kernel_for(spec), make_params(spec.experts, 64, 40, 6)
    inputs = [(torch.randn(50, 64), *routing("random", 50, 6, 2, seed=i)) for i in range(8)]
    want = [kernel.experts(*i, params) for i in inputs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: kernel.experts(*i, params), inputs))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
