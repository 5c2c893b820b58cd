"""Generated kernels of the experts' gradients against float64, over gates, layouts, dtypes, routings and strides.

Every spec is one build of about three seconds, so each combines several features; together they cover all values.
"""

import pytest
import torch
from moe_reference import CLAMPED, make_params, relative, routing

from moec.codegen import backward_plan, cpp, twin
from moec.codegen.plan import Rows
from moec.codegen.tuning import Sizes, row_block
from moec.errors import CodegenError
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.runtime.backward import load_backward
from moec.runtime.cpu import load_kernel
from moec.target import Target

SPECS = {
    "swiglu": KernelSpec(ExpertsSpec()),
    "swiglu_bf16": KernelSpec(ExpertsSpec("bf16"), y_dtype="bf16"),
    "oss_bf16": KernelSpec(
        ExpertsSpec("bf16", "interleaved", "kn", "kn", CLAMPED, bias_in=True, bias_out=True), y_dtype="bf16"
    ),
    "biases_in_f32": KernelSpec(
        ExpertsSpec("bf16", "interleaved", "kn", "kn", CLAMPED, bias_in=True, bias_out=True, biases="f32")
    ),
    "separate_biases_in_f32": KernelSpec(
        ExpertsSpec(
            "f16", "separate", "nk", "nk", "mul(gelu(a), b)", bias_in=True, bias_out=True, stacked=False, biases="f32"
        )
    ),
    "oss_f32": KernelSpec(
        ExpertsSpec("f32", "interleaved", "nk", "kn", CLAMPED, bias_in=True, bias_out=True, stacked=False)
    ),
    "separate_f16": KernelSpec(
        ExpertsSpec("f16", "separate", "nk", "nk", "mul(gelu(a), b)", bias_in=True, stacked=False), y_dtype="f16"
    ),
    "separate_bf16": KernelSpec(
        ExpertsSpec("bf16", "separate", "nk", "kn", "mul(gelu(a), b)", bias_in=True, bias_out=True), y_dtype="bf16"
    ),
    "plain_bf16": KernelSpec(ExpertsSpec("bf16", "none", "nk", "nk", "gelu(a)", stacked=False), y_dtype="bf16"),
    "plain_kn": KernelSpec(
        ExpertsSpec("f32", "none", "kn", "nk", "mul(relu(a), relu(a))", bias_out=True, weight_on="input")
    ),
    "plain_f16_kn": KernelSpec(ExpertsSpec("f16", "none", "kn", "kn", "gelu_tanh(a)", bias_in=True, stacked=False)),
    "on_input": KernelSpec(
        ExpertsSpec("f32", "separate", "kn", "nk", "mul(softplus(a), tanh(b))", weight_on="input", bias_in=True)
    ),
    "concat_kn_bf16": KernelSpec(ExpertsSpec("bf16", "concat", "kn", "nk", bias_in=True, weight_on="input")),
}
NAMES = sorted(SPECS)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def flat(gradients):
    dx, dweights, dparams = gradients
    return [dx, dweights, *dparams]


def exact(grad, x, weights, experts, params, spec):
    """float64 gradients of what the layer computes: where weights are narrow, x is rounded to their dtype."""
    wide = [p.double() for p in params]
    needs = [True] * (2 + len(params))
    rounded = x if spec.experts.weight_on == "input" else x.to(params[0].dtype)
    found = twin.experts_backward(
        grad.double(), rounded.double(), weights.double().nan_to_num(), experts, wide, spec, needs
    )
    return flat(found)


def close(got, want, dtype, eager=None):
    """Within rounding of fp32 for floats; for narrow dtypes no worse than 1.5 times the eager twin's own error."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        assert torch.isfinite(g.float()).all()
        own = 0.0 if eager is None else relative(eager[i], w)
        floor = 3e-6 if dtype == "f32" else 2 * float(torch.finfo(DTYPES[dtype]).eps)
        assert relative(g, w) <= max(1.5 * own, floor), f"gradient {i}: {relative(g, w)}, eager's {own}"


def check(spec, kernel, H, F, E, k, T, kind, strided=False):
    dtype = DTYPES[spec.experts.dtype]
    params = make_params(spec.experts, H, F, E, seed=T)
    weights, experts = routing(kind, T, E, k, seed=T)
    if kind == "twice" and k > 1:
        experts = experts[:, :1].expand(T, k)  # one expert in every slot of a token
    x, grad = (torch.randn(2 * H, T, generator=torch.Generator().manual_seed(i)).to(dtype)[::2].t() for i in (1, 2))
    if not strided:
        x, grad = x.contiguous(), grad.contiguous()
    needs = [True] * (2 + len(params))
    got = flat(kernel(grad, x, weights, experts, params, None, needs))
    eager = flat(twin.experts_backward(grad, x, weights.nan_to_num(), experts, params, spec, needs))
    assert [g.dtype for g in got] == [x.dtype, weights.dtype, *(p.dtype for p in params)]
    close(got, exact(grad, x, weights, experts, params, spec), spec.experts.dtype, eager)
    return got, (grad, x, weights, experts, params)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_float64(name):
    spec = SPECS[name]
    kernel = load_backward(str(spec))
    for T, kind in (
        *((0, "random"), (1, "random"), (7, "sentinels"), (13, "same"), (13, "twice"), (200, "random")),
        *((130, "same"), (90, "sentinels")),
    ):
        check(spec, kernel, 67, 37, 8, 2, T, kind)
    check(spec, kernel, 67, 37, 8, 2, 33, "random", strided=True)
    check(spec, kernel, 32, 48, 4, 4, 13, "random")
    check(spec, kernel, 48, 32, 3, 1, 200, "random")
    check(spec, kernel, 1, 1, 3, 1, 7, "random")


@pytest.mark.parametrize("name", ["swiglu_bf16", "oss_f32", "concat_kn_bf16"])
def test_rows_of_an_expert_are_cut_into_tasks(name):
    spec = SPECS[name]
    assert row_block(spec.experts, Target.host()) < 600
    check(spec, load_backward(str(spec)), 67, 37, 3, 2, 600, "same")


@pytest.mark.parametrize("name", ["swiglu_bf16", "oss_f32", "separate_f16", "plain_kn"])
def test_saved_projections_give_the_gradients_of_recomputed_ones(name):
    spec = SPECS[name]
    kernel, forward = load_backward(str(spec)), load_kernel(str(spec), None)
    got, (grad, x, weights, experts, params) = check(spec, kernel, 67, 37, 8, 2, 50, "sentinels")
    width = 37 * spec.experts.ab_views
    needs = [True] * (2 + len(params))
    kept = [torch.full((100, width), float("nan"), dtype=params[0].dtype) for _ in range(2)]
    y = forward.experts(x, weights, experts, params, kept[0])
    assert torch.equal(y, forward.experts(x, weights, experts, params))
    twin.experts(x, weights, experts, params, spec, kept[1])
    known = ((experts >= 0) & (experts < 8)).flatten()
    assert kept[0][~known].isnan().all()
    assert relative(kept[0][known], kept[1][known]) < (2e-6 if spec.experts.dtype == "f32" else 1e-2)
    again = flat(kernel(grad, x, weights, experts, params, kept[0], needs))
    if spec.experts.dtype == "f32":
        assert all(relative(a, b) < 2e-6 for a, b in zip(again, got, strict=True))
    eager = flat(twin.experts_backward(grad, x, weights.nan_to_num(), experts, params, spec, needs))
    close(again, exact(grad, x, weights, experts, params, spec), spec.experts.dtype, eager)


@pytest.mark.parametrize("name", NAMES)
def test_bitwise_equal_for_any_number_of_threads_and_in_several_groups(name, threads, monkeypatch):
    """Groups of experts bound the workspace; what is added from group to group must not depend on threads."""
    spec = SPECS[name]
    kernel = load_backward(str(spec))
    threads(1)
    whole, (grad, x, weights, experts, params) = check(spec, kernel, 67, 37, 8, 3, 200, "sentinels")
    needs = [True] * (2 + len(params))
    backward_plan.make_backward_plan.cache_clear()
    monkeypatch.setattr(backward_plan, "_GROUP_BYTES", 100 * 4 * 200)
    try:
        found = []
        for n in (1, 2, 3):
            threads(n)
            found.append(flat(kernel(grad, x, weights, experts, params, None, needs)))
    finally:
        backward_plan.make_backward_plan.cache_clear()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert all(
        relative(a, b) < (1e-6 if a.dtype == torch.float32 else 5e-3) for a, b in zip(found[0], whole, strict=True)
    )
    monkeypatch.undo()
    threads(2)
    plain = flat(kernel(grad, x, weights, experts, params, None, needs))
    assert all(torch.equal(a, b) for a, b in zip(plain, whole, strict=True))


@pytest.mark.parametrize("name", ["swiglu", "oss_f32", "on_input", "plain_kn"])
def test_only_what_is_needed_is_computed(name):
    spec = SPECS[name]
    kernel = load_backward(str(spec))
    want, (grad, x, weights, experts, params) = check(spec, kernel, 67, 37, 5, 2, 40, "random")
    count = 2 + len(params)
    for one in range(count):
        needs = [i == one for i in range(count)]
        got = flat(kernel(grad, x, weights, experts, params, None, needs))
        assert [g.numel() > 0 for g in got] == needs
        assert [g.dim() for g in got[2:]] == [p.dim() for p in params]
        assert torch.equal(got[one], want[one])
    assert all(g.numel() == 0 for g in flat(kernel(grad, x, weights, experts, params, None, [False] * count)))


@pytest.mark.parametrize("name", ["swiglu", "oss_f32"])
def test_idle_experts_get_zeros(name):
    spec = SPECS[name]
    params = make_params(spec.experts, 24, 20, 6)
    weights, experts = torch.rand(9, 2), torch.tensor([[1, 4]]).expand(9, 2)
    grads = load_backward(str(spec))(torch.randn(9, 24), torch.randn(9, 24), weights, experts, params, None,
                                     [True] * (2 + len(params)))[2]  # fmt: skip
    count = 1 if spec.experts.stacked else 6
    for i in range(0, len(grads), count):
        each = grads[i].unbind(0) if spec.experts.stacked else grads[i : i + count]
        assert [bool(g.any()) for g in each] == [e in (1, 4) for e in range(6)]


def test_gradients_of_expanded_and_narrow_outputs():
    """y.sum() hands over one number for all of y; a narrow y hands over narrow numbers."""
    spec = SPECS["swiglu"]
    params = make_params(spec.experts, 24, 20, 6)
    weights, experts = routing("random", 30, 6, 2)
    x = torch.randn(30, 24)
    needs = [True] * 4
    for grad in (torch.ones(()).expand(30, 24), torch.randn(30, 24).bfloat16(), torch.randn(30, 48).half()[:, 1::2]):
        got = flat(load_backward(str(spec))(grad, x, weights.double(), experts.int(), params, None, needs))
        assert got[1].dtype == torch.float64
        close(got, exact(grad, x, weights, experts, params, spec), "f32")


@pytest.mark.parametrize(
    ("isa", "name"),
    [
        ("plain", "swiglu_bf16"),
        ("amx_bf16", "separate_bf16"),
        *(
            pytest.param("avx512_bf16", name, marks=pytest.mark.slow)
            for name in ("oss_bf16", "separate_bf16", "plain_bf16")
        ),
    ],
)
def test_other_widths_of_vectors_by_emulation(isa, name):
    spec = SPECS[name]
    kernel = load_backward(str(spec), Target.host().emulating(isa))
    check(spec, kernel, 67, 37, 8, 2, 60, "sentinels")
    check(spec, kernel, 32, 48, 4, 4, 200, "random")


def test_slopes_are_spelled_out():
    text = cpp.emit_backward(SPECS["swiglu"], Target("avx2", 8, 6, 2, 3, False, ()))
    assert "void slopes(vf a, vf b, vf& h, vf& da, vf& db)" in text
    assert "h = mul(silu(a), b);" in text or "h = mul(t" in text
    assert text.count("sigmoid(a)") == 1
    with pytest.raises(CodegenError, match="reads c"):
        cpp.emit_backward(KernelSpec(ExpertsSpec(activation="mul(a, c)")), Target.host())


def test_shapes_that_do_not_fit_are_refused():
    spec = SPECS["swiglu"]
    params = make_params(spec.experts, 24, 20, 6)
    weights, experts = routing("random", 5, 6, 2)
    with pytest.raises(CodegenError, match=r"want \[T, 24\]"):
        load_backward(str(spec))(torch.randn(5, 23), torch.randn(5, 23), weights, experts, params, None, [True] * 4)


AVX2 = Target("avx2", 8, 6, 2, 3, False, ())
PAIRS = Target("avx512_bf16", 16, 12, 2, 6, True, ())


def plan(T, most=0, spec=SPECS["swiglu"], H=2048, F=768, E=64, k=8, threads=2, target=AVX2):
    rows = Rows(spec.experts.dtype, H, True)
    return backward_plan.make_backward_plan(spec, Sizes(T, H, F, E, k), rows, rows, most, target, threads)


def test_pairs_of_bf16_halve_what_a_plan_holds():
    spec = SPECS["swiglu_bf16"]
    row_numbers = 4096 * (2048 + 32)
    wide, narrow = (plan(4096, spec=spec, target=target) for target in (AVX2, PAIRS))
    assert wide.workspace_bytes - narrow.workspace_bytes > 2 * row_numbers, "x and y's gradient are copied as bf16"
    assert narrow.group > 1.3 * wide.group, "more pairs at a time in the same memory"
    assert plan(4096, target=PAIRS).group == plan(4096).group


def test_plan_bounds_the_workspace():
    pairs = backward_plan.group_pairs(SPECS["swiglu"], 2048, 768, AVX2)
    copies = 2 * 4096 * (2048 + 16) * 4
    assert plan(4096, pairs).workspace_bytes < copies + (64 << 20)
    grown = plan(4096, 4096).workspace_bytes - plan(4096, pairs).workspace_bytes
    assert grown == pytest.approx((4096 - pairs) * (768 * 3 + 32 + 2048) * 4, rel=0.01)
    p = plan(200)
    assert all(place % 64 == 0 for place in p.places)
    assert list(p.places) == sorted(p.places)
    assert p.thread_places[0] % 4096 == 0


def test_numbers_of_a_plan_do_not_depend_on_threads_but_for_the_workspace():
    one, four = plan(200, threads=1), plan(200, threads=4)
    assert one.words[1:] == four.words[1:]


def test_memory_model():
    """Projections are kept where that stays under 60 % of what plain torch keeps."""
    assert backward_plan.saves_activations(SPECS["swiglu"], 2048, 768, 2048, 8)
    assert backward_plan.saves_activations(SPECS["swiglu_bf16"], 1024, 3584, 1024, 2)
    assert not backward_plan.saves_activations(SPECS["swiglu_bf16"], 8192, 64, 8192, 1)
