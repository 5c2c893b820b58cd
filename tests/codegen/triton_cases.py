"""Triton kernels against the twin and a float64 loop, in the interpreter or on a GPU (elsewhere.py).

Run by test_triton.py in its own process.
"""

import dataclasses
import itertools

import pytest
import torch
from elsewhere import DEVICE, There
from moe_reference import CLAMPED, PHI, layer, make_params, relative, routing
from quick_interpreter import quick  # noqa: F401

import moec.runtime.ops  # noqa: F401  # defines the ops
from moec.codegen import twin
from moec.codegen.plan import Sizes
from moec.codegen.triton_config import GpuConfig, default_config
from moec.codegen.triton_launch import program
from moec.errors import CodegenError
from moec.gpu.target import gpu_target
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.runtime.triton import TritonKernel, load_triton

LIMITS = {"f32": 2e-6, "bf16": 1e-2, "f16": 2e-3}
SORTED = GpuConfig(16, 32, 32, group_m=2, num_stages=1)
SEPARATE = GpuConfig(32, 16, 16, group_m=8, combine="separate")
ATOMIC = GpuConfig(16, 32, 32, group_m=2, num_stages=1, combine="atomic")
DECODE = GpuConfig(16, 16, 32, variant="decode")
SCHEDULES = {
    "persistent": dataclasses.replace(SORTED, programs=3),
    "persistent-separate": dataclasses.replace(SEPARATE, programs=3),
    "descriptors": dataclasses.replace(SORTED, weights="descriptors"),
    "descriptors-persistent": dataclasses.replace(SORTED, weights="descriptors", programs=3),
    "specialized": GpuConfig(
        128, 32, 32, 2, 4, 1, combine="separate", weights="descriptors", programs=2, specialized=True
    ),
}


def kernel(spec, config=None):
    """The kernels of a spec, with one configuration for all sizes where one is given."""
    return There(TritonKernel(spec, DEVICE).with_config(config) if config else load_triton(str(spec), DEVICE))


def with_gate(gate, layout, stacked, bias, on, dtype="f32"):
    phi = "gelu_tanh(a)" if gate == "none" else "mul(silu(a), b)"
    other = "kn" if layout == "nk" and stacked else layout
    return KernelSpec(
        ExpertsSpec(dtype, gate, layout, other, phi, bias_in=bias, bias_out=bias, weight_on=on, stacked=stacked),
        y_dtype=dtype,
    )


def check_experts(spec, config, T, H, F, E, k, kind="random", x=None, O=None):
    params = make_params(spec.experts, H, F, E, O=O)
    weights, experts = routing(kind, T, E, k)
    x = torch.randn(T, H).to(params[0].dtype) if x is None else x
    y = kernel(spec, config).experts(x, weights, experts, params)
    assert y.dtype == DTYPES[spec.y_dtype]
    assert relative(y, layer(x, weights, experts, params, spec)) < LIMITS[spec.experts.dtype]


CONFIGS = (SORTED, SEPARATE, ATOMIC, DECODE)

FORMS = [
    ("none", "nk", True, True, "output"),
    ("none", "kn", False, False, "input"),
    ("concat", "nk", True, True, "input"),
    ("concat", "kn", True, False, "output"),
    ("concat", "nk", False, True, "output"),
    ("interleaved", "kn", True, True, "output"),
    ("interleaved", "nk", False, False, "output"),
    ("separate", "nk", True, True, "output"),
    ("separate", "kn", False, True, "input"),
]
ALL_FORMS = list(
    itertools.product(
        ("none", "concat", "interleaved", "separate"), ("nk", "kn"), (True, False), (True, False), ("output", "input")
    )
)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("config", [SORTED, DECODE], ids=lambda c: c.variant)
def test_forms(form, config):
    check_experts(with_gate(*form), config, 5, 20, 24, 3, 2, "sentinels")


def wide_biases(form):
    """Products in bf16, biases in fp32."""
    spec = with_gate(*form, "bf16")
    return dataclasses.replace(spec, experts=dataclasses.replace(spec.experts, biases="f32"), y_dtype="f32")


@pytest.mark.parametrize("config", [SORTED, DECODE], ids=lambda c: c.variant)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[4], FORMS[5], FORMS[8]], ids=str)
def test_biases_in_another_dtype(form, config):
    check_experts(wide_biases(form), config, 5, 20, 24, 3, 2, "sentinels")


def one_matrix(form, dtype="f32"):
    spec = with_gate(*form, dtype)
    return dataclasses.replace(spec, experts=dataclasses.replace(spec.experts, bias_out=False, out=False))


@pytest.mark.parametrize("config", [SORTED, ATOMIC, DECODE], ids=lambda c: f"{c.variant}-{c.combine}")
@pytest.mark.parametrize("O", [1, 37])
def test_outputs_of_another_width(O, config):
    check_experts(with_gate(*FORMS[2]), config, 5, 20, 24, 3, 2, "sentinels", O=O)


@pytest.mark.parametrize("config", [SORTED, ATOMIC, DECODE, SCHEDULES["persistent"]], ids=str)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[5]], ids=str)
def test_experts_without_an_output_matrix(form, config):
    check_experts(one_matrix(form), config, 5, 20, 17, 3, 2, "sentinels")


@pytest.mark.parametrize("form", [FORMS[0], FORMS[8]], ids=str)
def test_slots_added_by_atomics(form):
    check_experts(with_gate(*form, "bf16"), ATOMIC, 5, 20, 24, 3, 2, "sentinels")


def test_atomics_by_option():
    spec = with_gate("concat", "nk", True, False, "output")
    params, (weights, experts) = make_params(spec.experts, 24, 16, 2), routing("random", 40, 2, 1)
    x = torch.randn(40, 24)
    made = load_triton(str(spec), DEVICE, "atomic")
    sizes = Sizes(40, 24, 16, 2, 1)
    assert made.config_for(sizes).combine == "atomic"
    (slots,) = [b for b in program(spec, sizes, made.config_for(sizes)).buffers if b.name == "slots"]
    assert (slots.dtype, slots.shape, slots.zeros) == ("f32", (40, 24), True)
    y = There(torch.ops.moec.experts)(x, weights, experts, params, str(spec), "triton combine=atomic")
    assert relative(y, layer(x, weights, experts, params, spec)) < LIMITS["f32"]


@pytest.mark.parametrize("schedule", ["descriptors", "persistent", "specialized"])
def test_ways_by_option(schedule):
    spec = with_gate("concat", "nk", True, False, "output")
    params, (weights, experts) = make_params(spec.experts, 64, 32, 2), routing("random", 40, 2, 1)
    params = [p.contiguous() for p in params]
    x = torch.randn(40, 64)
    y = There(torch.ops.moec.experts)(x, weights, experts, params, str(spec), f"triton schedule={schedule}")
    assert relative(y, layer(x, weights, experts, params, spec)) < LIMITS["f32"]


def check_schedule(form, name, dtype, T, kind, H=64, F=32, E=3):
    """Descriptors take contiguous weights only; others are an error that says so."""
    spec, config = with_gate(*form, dtype), SCHEDULES[name]
    params = [p.contiguous() for p in make_params(spec.experts, H, F, E)]
    weights, experts = routing(kind, T, E, 2)
    x = torch.randn(T, H).to(params[0].dtype)
    if config.weights == "descriptors" and not spec.experts.stacked:
        with pytest.raises(CodegenError, match="each expert has a tensor of its own"):
            kernel(spec, config).experts(x, weights, experts, params)
        return
    y = kernel(spec, config).experts(x, weights, experts, params)
    assert relative(y, layer(x, weights, experts, params, spec)) < LIMITS[dtype]


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, FORMS[i]) for name in SCHEDULES for i in ((0, 2, 7) if "desc" in name else (3, 4))],
    ids=str,
)
def test_schedules(name, form):
    check_schedule(form, name, "bf16", 5, "sentinels")


def in_turn(forms, *others):
    """Every form with all others, in one dtype each: a form meets all dtypes, two words of it all others and dtypes."""
    pairs = itertools.product(enumerate(forms), enumerate(itertools.product(*others)))
    made = [(form, *rest, list(LIMITS)[(i + j) % 3]) for (i, form), (j, rest) in pairs]
    return [pytest.param(*values, id="-".join(map(word, values))) for values in made]


def word(value):
    return f"{value.variant}-{value.combine}" if isinstance(value, GpuConfig) else str(value)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "name", "dtype"), in_turn(ALL_FORMS, SCHEDULES))
def test_all_schedules(form, name, dtype):
    for T, kind in ((1, "random"), (7, "same"), (13, "sentinels"), (70, "random")):
        check_schedule(form, name, dtype, T, kind, 64, 96, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "config", "dtype"), in_turn(ALL_FORMS, CONFIGS))
def test_all_forms(form, config, dtype):
    for T, kind in ((1, "random"), (7, "same"), (13, "sentinels")):
        check_experts(with_gate(*form, dtype), config, T, 33, 20, 4, 2, kind)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("config", [SORTED, SEPARATE, DECODE], ids=word)
def test_half_precision(dtype, config):
    check_experts(with_gate("concat", "nk", True, True, "output", dtype), config, 7, 40, 24, 3, 2)
    check_experts(with_gate("interleaved", "kn", True, False, "input", dtype), config, 7, 24, 17, 3, 2)


@pytest.mark.parametrize("phi", sorted(PHI))
def test_activations(phi):
    gate = "concat" if "b" in phi.replace("sub", "").replace("abs", "") and phi != "gelu_tanh(a)" else "none"
    spec = KernelSpec(ExpertsSpec(gate=gate, activation=phi))
    check_experts(spec, SORTED, 7, 16, 12, 2, 2)


def test_tanh_is_exact_but_for_rounding():
    """Routers that cap their logits compare what it makes of them."""
    spec = KernelSpec(ExpertsSpec(gate="none", activation="tanh(a)", out=False))
    some = torch.linspace(0, 10, 10241)[1:]
    x = torch.cat([some, -some, some * 1e-3, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 30, -30, 1e3, -1e3] * 8)])
    x = x.reshape(-1, 64)
    want = x.double().tanh()
    unit = want.abs().float().nextafter(torch.tensor(torch.inf)).double() - want.abs()
    weights, experts = torch.ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int64)
    y = kernel(spec, SORTED).experts(x, weights, experts, [torch.eye(64)[None]])
    assert ((y.double() - want).abs() <= 3 * unit).all()


@pytest.mark.parametrize(
    ("T", "E", "k", "kind"),
    [(1, 1, 1, "random"), (7, 3, 3, "same"), (200, 3, 1, "same"), (13, 16, 16, "random"), (2, 512, 16, "random")],
)
def test_sizes(T, E, k, kind):
    spec = with_gate("concat", "nk", True, False, "output")
    large = GpuConfig(64, 64, 32, num_stages=1)
    check_experts(spec, large if T * k > 40 and E < 100 else None, T, 24, 20, E, k, kind)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("T", [1, 7, 13, 200])
@pytest.mark.parametrize(("E", "k"), [(1, 1), (3, 1), (3, 3), (16, 16), (512, 1), (512, 16)])
@pytest.mark.parametrize("kind", ["random", "same", "sentinels"])
def test_all_sizes(T, E, k, kind, dtype):
    check_experts(with_gate("concat", "nk", True, True, "output", dtype), None, T, 40, 36, E, k, kind)


@pytest.mark.parametrize(("form", "k", "F"), [(FORMS[2], 3, 600), (FORMS[6], 16, 150), (FORMS[7], 16, 150)], ids=str)
def test_few_tokens_in_several_steps(form, k, F):
    """Matrices longer than what a block reads at once, of all slots."""
    check_experts(with_gate(*form, "bf16"), None, 1, 520, F, 16, k, "sentinels", O=20)


def test_nothing_to_do():
    spec = with_gate("concat", "nk", True, False, "output")
    params = make_params(spec.experts, 16, 8, 2)
    none = kernel(spec).experts(torch.randn(0, 16), *routing("random", 0, 2, 1), params)
    assert none.shape == (0, 16)
    y = kernel(spec, SORTED).experts(torch.randn(3, 16), torch.rand(3, 1), torch.full((3, 1), 2), params)
    assert torch.equal(y, torch.zeros(3, 16))


@pytest.mark.parametrize("config", [SORTED, DECODE], ids=lambda c: c.variant)
def test_x_of_other_strides_and_dtype(config):
    spec = with_gate("concat", "kn", True, False, "output", "bf16")
    wide = torch.randn(24, 10)
    check_experts(spec, config, 5, 24, 20, 3, 2, x=wide.t()[::2])


def test_separate_tensors_of_unlike_strides_and_bad_shapes():
    spec = with_gate("concat", "nk", False, False, "output")
    params = [p.contiguous() for p in make_params(spec.experts, 16, 12, 3)]
    params[1] = params[1].t().contiguous().t()
    weights, experts = routing("random", 5, 3, 2)
    x = torch.randn(5, 16)
    y = kernel(spec).experts(x, weights, experts, params)
    assert relative(y, layer(x, weights, experts, params, spec)) < LIMITS["f32"]
    with pytest.raises(CodegenError, match=r"parameter 'ab' is \[24, 15\], expected \[24, 16\]"):
        kernel(spec).experts(x, weights, experts, [params[0], params[1][:, :15], *params[2:]])


def test_defaults_are_sane():
    spec = with_gate("concat", "nk", True, False, "output", "bf16")
    assert default_config(spec, Sizes(1, 4096, 14336, 8, 2)).variant == "decode"
    assert default_config(spec, Sizes(64, 2048, 768, 128, 8)).block_m == 16
    few, h100 = Sizes(1, 2048, 768, 128, 8), gpu_target("sm_90")
    apart = with_gate("interleaved", "kn", True, False, "output", "bf16")
    made = [default_config(each, few, h100) for each in (spec, apart)]
    tiles = [(c.block_n, c.block_k, c.num_stages) for c in made]
    assert tiles == [(8, 256, 4), (64, 64, 3)]
    assert default_config(spec, few, gpu_target("gfx942")).num_stages == 1
    short, long = Sizes(4096, 2048, 768, 128, 8), Sizes(4096, 4096, 14336, 8, 2)
    assert [default_config(spec, each, h100).num_stages for each in (short, long)] == [4, 3]
    assert default_config(spec, Sizes(4096, 4096, 14336, 8, 2)).block_m == 128
    with pytest.raises(CodegenError, match="block_m=24"):
        GpuConfig(24, 32, 32)
    with pytest.raises(CodegenError, match="block_n=8: expected a power of two, 16 to 1024"):
        GpuConfig(16, 8, 32)


def test_clamped_activation_of_interleaved_gates():
    spec = KernelSpec(
        ExpertsSpec("bf16", "interleaved", "kn", "kn", CLAMPED, bias_in=True, bias_out=True), y_dtype="bf16"
    )
    check_experts(spec, SORTED, 7, 32, 24, 3, 2)


def spread_out(tensor, rows):
    """`tensor` whose rows (axis -2, `rows` of them) lie so far apart that the last begins past 2³¹."""
    row = (1 << 31) // (rows - 1) + 64
    wide = torch.empty(rows * row - row + tensor.shape[-1], dtype=tensor.dtype)  # only what is written takes memory
    return wide.as_strided(tensor.shape, (rows * row, row, 1)[-tensor.dim() :]).copy_(tensor)


@pytest.mark.parametrize("config", [SORTED, DECODE], ids=lambda c: c.variant)
def test_offsets_past_two_to_the_31(config):
    """Rows of x, of the router and of an expert's matrix, each in turn."""
    spec = KernelSpec(ExpertsSpec("f16"), RouterSpec(), "f16")
    T, H, F, E, k = 3, 16, 2, 3, 2
    params, x = make_params(spec.experts, H, F, E), torch.randn(T, H).half()
    router = torch.randn(E, H).half()
    want = twin.experts(x, *twin.route(x, [router], k, spec.router)[1:], params, spec)
    far_x, far_router = spread_out(x, T), spread_out(router, E)
    far_params = [spread_out(params[0][:1], 2 * F).expand(E, -1, -1), params[1]]
    same = [params[0][:1].expand(E, -1, -1), params[1]]
    run = kernel(spec, config).moe
    for given, reference in (((far_x, router, params), want), ((x, far_router, params), want)):
        y, _, weights, experts = run(given[0], [given[1]], given[2], k)
        assert relative(y, reference) < LIMITS["f16"]
    y, _, weights, experts = run(x, [router], far_params, k)
    assert relative(y, twin.experts(x, weights, experts, same, spec)) < LIMITS["f16"]
