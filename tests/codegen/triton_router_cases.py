"""Triton's routers against the twin, in the interpreter or on a GPU (elsewhere.py).

Run by test_triton.py in its own process.
"""

import dataclasses

import pytest
import torch
from elsewhere import moved
from moe_reference import make_params, relative
from quick_interpreter import quick  # noqa: F401
from triton_cases import DECODE, LIMITS, SORTED, kernel

import moec.runtime.ops  # noqa: F401  # defines the ops
from moec.codegen import triton_route, twin
from moec.codegen.plan import Sizes
from moec.codegen.triton_call import at, tile_buffers
from moec.codegen.triton_config import GpuConfig
from moec.codegen.triton_emit import load
from moec.codegen.triton_route import routing, routing_buffers
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


def run_routing(spec, T, E, k, **given):
    """What the launches before the first product wrote, their buffers holding anything before."""
    made = at(spec, Sizes(T, 24, 16, E, k), GpuConfig(16, 32, 32), None, None)
    dtypes = {"f32": torch.float32, "i32": torch.int32}
    tensors = {
        b.name: torch.randint(-9, 9, b.shape).to(dtypes[b.dtype]) for b in (*routing_buffers(made), *tile_buffers(made))
    }
    tensors = {name: moved(tensor) for name, tensor in {**tensors, **given}.items()}
    for launch in routing(made):
        arguments = [tensors[a.name] if a.type.startswith("*") else a.value for a in launch.arguments]
        getattr(load(spec), launch.kernel)[launch.grid](*arguments, **launch.options())
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def check_order(found, E, rows=16):
    """Pairs by expert, by number among equals; where experts begin; tiles of `rows` rows; how many there are."""
    chosen = found["experts"].flatten()
    pairs = torch.nonzero((chosen >= 0) & (chosen < E)).flatten()
    want = pairs[torch.sort(chosen[pairs], stable=True).indices]
    count = torch.bincount(chosen[pairs], minlength=E)
    tiles = [(e, int(count[:e].sum()) + row) for e in range(E) for row in range(0, int(count[e]), rows)]
    assert found["order"][: len(want)].tolist() == want.tolist()
    assert found["offsets"].tolist() == [0, *count.cumsum(0).tolist()]
    assert list(zip(found["tile_expert"].tolist(), found["tile_row"].tolist(), strict=True))[: len(tiles)] == tiles
    assert found["counters"][:4].tolist() == [len(tiles), 0, 0, len(want)]


@pytest.mark.parametrize(("T", "E", "k"), [(1, 3, 2), (40, 5, 2), (33, 130, 3)])
@pytest.mark.parametrize("spread", [False, True])
def test_choices_are_ordered(monkeypatch, T, E, k, spread):
    """Several groups of tokens, units of several tokens, and all of one call in one."""
    if spread:
        monkeypatch.setattr(triton_route, "_GROUP", 16)
        monkeypatch.setattr(triton_route, "_CHOICES", 4)
    spec = KernelSpec(ExpertsSpec(), RouterSpec())
    x, router = torch.randn(T, 24), torch.randn(E, 24)
    room = {"logits": torch.empty(T, E), "weights": torch.empty(T, k), "experts": torch.empty(T, k, dtype=torch.int64)}
    found = run_routing(spec, T, E, k, x=x, router=router, **room)
    assert torch.equal(found["experts"], torch.sort(x @ router.t(), descending=True, stable=True).indices[:, :k])
    check_order(found, E)


@pytest.mark.parametrize("kind", ["random", "one", "outside"])
@pytest.mark.parametrize(("T", "E", "k"), [(1, 3, 2), (40, 5, 2), (19, 130, 3)])
def test_given_choices_are_ordered(monkeypatch, T, E, k, kind):
    """As one launch, and where another one counts groups of pairs before."""
    chosen = torch.randint(E, (T, k)) if kind == "random" else torch.full((T, k), E - 1)
    if kind == "outside":
        chosen = torch.randint(-1, E + 1, (T, k))
        chosen[::3] = 2**32 + 1  # in 32 bits an expert's number
    check_order(run_routing(KernelSpec(ExpertsSpec()), T, E, k, experts=chosen), E)
    monkeypatch.setattr(triton_route, "_RECOUNTED", 0)
    monkeypatch.setattr(triton_route, "_GROUP", 16)
    check_order(run_routing(KernelSpec(ExpertsSpec()), T, E, k, experts=chosen), E)


def lowest_of_equals(values, k, dim=-1, sorted=True):
    """torch.topk, the lowest index first among equals."""
    found = values.sort(dim=dim, descending=True, stable=True)
    return torch.return_types.topk((found.values[..., :k], found.indices[..., :k]))


def twin_route(monkeypatch, *args):
    """The twin's routing, which takes the lowest index among equals, where torch.topk takes any."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "topk", lowest_of_equals)
        return twin.route(*args)


def check_router(monkeypatch, r, config, T, E, k, dtype="f32", H=40):
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
    plain = dataclasses.replace(r, bias=False)
    _, want_weights, want_experts = twin_route(monkeypatch, logits, [eye, *extra[r.bias :]], k, plain)
    assert torch.equal(experts, want_experts)
    assert torch.equal(weights.isnan(), want_weights.isnan())  # of an expert that no chosen group has
    spoilt = weights.isnan().any(1)
    weights, want_weights = weights.nan_to_num(), want_weights.nan_to_num()
    assert relative(weights, want_weights) < (1e-6 if r.weight_dtype == "f32" else 8e-3)
    want = twin.experts(x, weights, experts, params, spec)
    assert y[spoilt].isnan().all()
    assert relative(y[~spoilt], want[~spoilt]) < LIMITS[dtype]


@pytest.mark.parametrize("config", [SORTED, DECODE], ids=lambda c: c.variant)
@pytest.mark.parametrize("name", ["bf16-bias", "groups-max"])
@pytest.mark.parametrize("E", [4, 12, 16])
def test_groups_of_few_and_of_many_experts(monkeypatch, name, E, config):
    """Also of one each, and where groups lie together in a power of two."""
    check_router(monkeypatch, ROUTERS[name], config, 3, E, 2)


@pytest.mark.parametrize("name", ROUTERS)
def test_routers(monkeypatch, name):
    check_router(monkeypatch, ROUTERS[name], SORTED, 5, 8, 3)


@pytest.mark.parametrize("name", ["sigmoid-groups", "bf16-bias"])
def test_routers_of_few_tokens(monkeypatch, name):
    check_router(monkeypatch, ROUTERS[name], DECODE, 1, 12, 2)


@pytest.mark.parametrize(("E", "k"), [(1, 1), (512, 16)])
def test_routers_of_other_sizes(monkeypatch, E, k):
    check_router(monkeypatch, ROUTERS["renormalized"], None, 1, E, k, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("T", "E", "k"), [(1, 4, 4), (7, 64, 6), (200, 128, 8), (13, 512, 16)])
def test_all_routers(monkeypatch, name, dtype, T, E, k):
    check_router(monkeypatch, ROUTERS[name], None, T, E, k, dtype)


INF, NAN = float("inf"), float("nan")
ODD = {
    "one NaN": {3: NAN},
    "NaNs": {1: NAN, 2: -NAN, 7: NAN, 11: NAN},
    "all NaN": dict.fromkeys(range(12), NAN),
    "infinite": {5: INF, 9: INF},
    "infinite both ways": {0: -INF, 5: INF},
    "nothing but one": {e: -INF for e in range(12) if e != 4},
    "nothing": dict.fromkeys(range(12), -INF),
    "zeros": {e: (-1.0) ** e * 0.0 for e in range(12)},
}


def check_odd_logits(monkeypatch, name, row, config):
    """The experts chosen by a row of logits, and their weights, are the twin's, among equals the lowest."""
    E, k, T, H = 12, 5, 2, 16
    r = dataclasses.replace(ROUTERS[name], bias=False, compute="f32")
    logits = torch.linspace(-2, 2, E)[torch.randperm(E, generator=torch.Generator().manual_seed(1))]
    logits[list(ODD[row])] = torch.tensor(list(ODD[row].values()))
    router, x = torch.zeros(E, H), torch.zeros(T, H)
    router[:, 0], x[:, 0] = logits, 1
    extra = [torch.linspace(-0.5, 0.5, E)] if r.selection_bias else []
    spec = KernelSpec(ExpertsSpec(), r)
    y, given, weights, experts = kernel(spec, config).moe(x, [router, *extra], make_params(spec.experts, H, 8, E), k)
    assert torch.equal(given.nan_to_num(), logits.expand(T, E).nan_to_num())
    _, want, chosen = twin_route(monkeypatch, x, [router, *extra], k, r)
    assert torch.equal(experts, chosen)
    weights, want = weights.float(), want.float()
    assert torch.equal(weights.isnan(), want.isnan())
    assert torch.equal(weights.isinf(), want.isinf())
    assert torch.allclose(weights, want, 8e-3 if r.weight_dtype == "bf16" else 1e-5, 1e-30, equal_nan=True)
    del y


@pytest.mark.parametrize("row", ODD)
@pytest.mark.parametrize("name", ["renormalized", "sigmoid-groups", "logits"])
def test_odd_logits(monkeypatch, name, row):
    check_odd_logits(monkeypatch, name, row, SORTED)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SORTED, DECODE], ids=lambda c: c.variant)
@pytest.mark.parametrize("row", ODD)
@pytest.mark.parametrize("name", ROUTERS)
def test_all_odd_logits(monkeypatch, name, row, config):
    check_odd_logits(monkeypatch, name, row, config)


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
