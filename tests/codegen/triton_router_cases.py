"""Triton's routers against the twin, in the interpreter or on a GPU (elsewhere.py).

Run by test_triton.py in its own process.
"""

import dataclasses

import pytest
import torch
from moe_reference import make_params, relative
from quick_interpreter import quick  # noqa: F401
from triton_cases import DECODE, LIMITS, SORTED, kernel

import moec.runtime.ops  # noqa: F401  # defines the ops
from moec.codegen import twin
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec

ROUTERS = {
    "plain": RouterSpec(),
    "renormalized": RouterSpec(renormalize=True, bias=True),
    "sigmoid-groups": RouterSpec(
        score="sigmoid(logits)", selection_bias=True, groups=4, topk_group=2, renormalize=True, eps=1e-20, scale=2.5,
        masked_value=0.0,
    ),
    "groups-max": RouterSpec(groups=2, topk_group=1, group_score="max"),
    "softplus": RouterSpec(score="sqrt(softplus(logits))", selection_bias=True, weight_from="choice", clamp_min=1e-3),
    "logits": RouterSpec(score="logits", softmax_over_k=True),
    "capped": RouterSpec(score="mul(softmax, softmax)", softmax_of="mul(tanh(div(logits, 3.0)), 3.0)"),
    "relu-squared": RouterSpec(
        compute="bf16", score="mul(round_bf16(relu(logits)), relu(logits))", score_dtype="bf16", groups=2, topk_group=2,
    ),
    "by-logits": RouterSpec(choose_by="logits", selection_bias=True, renormalize=True, clamp_min=0.5),
    "bf16": RouterSpec(compute="bf16", score_dtype="bf16", softmax_over_k=True, weight_dtype="bf16", bias=True),
    "bf16-bias": RouterSpec(
        compute="bf16", score="sigmoid(logits)", score_dtype="bf16", selection_bias=True, weight_from="choice",
        groups=4, topk_group=2, renormalize=True, weight_dtype="bf16",
    ),
}  # fmt: skip


def check_router(r, config, T, E, k, dtype="f32", H=40):
    spec = KernelSpec(ExpertsSpec(dtype), r, dtype)
    params = make_params(spec.experts, H, 16, E)
    x, w = torch.randn(T, H).to(DTYPES[dtype]), torch.randn(E, H).to(DTYPES[dtype])
    extra = [torch.randn(E) for flag in (r.bias, r.selection_bias) if flag]
    y, logits, weights, experts = kernel(spec, config).moe(x, [w, *extra], params, k)
    assert (logits.dtype, weights.dtype) == (DTYPES[r.compute], DTYPES[r.weight_dtype])
    want_logits, _, _ = twin.route(x, [w, *extra], k, r)
    # What follows is judged from the kernel's own logits: another order of summation may round one of them otherwise.
    assert relative(logits, want_logits) < (1e-6 if r.compute == "f32" else 4e-3)
    eye = torch.eye(E, dtype=logits.dtype)
    _, want_weights, want_experts = twin.route(logits, [eye, *extra[r.bias :]], k, dataclasses.replace(r, bias=False))
    if k == E:  # all are chosen: among equals torch.topk's order is its own (the lowest first: see the ties below)
        (experts, at), (want_experts, to) = experts.sort(), want_experts.sort()
        weights, want_weights = weights.gather(1, at), want_weights.gather(1, to)
    assert torch.equal(experts, want_experts)
    assert torch.equal(weights.isnan(), want_weights.isnan())  # of an expert that no chosen group has
    weights, want_weights = weights.nan_to_num(), want_weights.nan_to_num()
    assert relative(weights, want_weights) < (1e-6 if r.weight_dtype == "f32" else 8e-3)
    want = twin.experts(x, weights, experts, params, spec)
    assert relative(y, want) < LIMITS[dtype]


@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name):
    check_router(ROUTERS[name], SORTED, 5, 8, 3)


@pytest.mark.parametrize("name", ["sigmoid-groups", "bf16-bias"])
def test_routers_of_few_tokens(name):
    check_router(ROUTERS[name], DECODE, 1, 12, 2)


@pytest.mark.parametrize(("E", "k"), [(1, 1), (512, 16)])
def test_routers_of_other_sizes(E, k):
    check_router(ROUTERS["renormalized"], None, 1, E, k, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("T", "E", "k"), [(1, 4, 4), (7, 64, 6), (200, 128, 8), (13, 512, 16)])
def test_all_routers(name, dtype, T, E, k):
    check_router(ROUTERS[name], None, T, E, k, dtype)


@pytest.mark.parametrize("config", [SORTED, DECODE], ids=lambda c: c.variant)
def test_ties_go_to_the_lowest_index(config):
    spec = KernelSpec(ExpertsSpec(), RouterSpec(score="logits"))
    E, k = 12, 5
    x, router = torch.eye(6, 16), torch.zeros(E, 16)
    router[:, 0] = torch.tensor([1.0, 2.0] * 6)
    router[:, 1] = torch.randint(0, 3, (E,)).float()
    router[:, 2] = torch.tensor([0.0, -0.0] * 6)
    router[:, 3] = float("-inf")
    router[::3, 4] = float("nan")
    router[5, 5] = float("inf")
    rows = router[:, :6].t().contiguous()  # what x·Wᵀ is, without NaN · 0
    got = kernel(spec, config).moe(rows, [torch.eye(E)], make_params(spec.experts, E, 8, E), k)[3]
    del x
    rank = torch.where(rows.isnan(), torch.inf, rows.clamp(max=1e30))
    want = torch.sort(rank, dim=-1, descending=True, stable=True).indices[:, :k]
    finite = [0, 1, 2]
    assert torch.equal(got[finite], want[finite])
    assert all(len(set(row.tolist())) == k and min(row) >= 0 and max(row) < E for row in got)
