"""What is emitted and launched, without running it: readable text, arguments that fit, few launches, wide offsets."""

import ast
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from moec.codegen.plan import Sizes
from moec.codegen.triton_backward import Wanted, backward_config, backward_program
from moec.codegen.triton_config import GpuConfig, check_target, default_config
from moec.codegen.triton_emit import emit, emit_backward
from moec.codegen.triton_launch import launches, program
from moec.codegen.triton_operands import contiguous
from moec.errors import CodegenError
from moec.gpu.target import GpuTarget, gpu_target, gpu_targets
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.target import GpuFigures

GOLDEN = Path(__file__).parent.parent / "golden" / "moe_bf16_triton.txt"
MIXTRAL = KernelSpec(ExpertsSpec("bf16"), RouterSpec(renormalize=True), "bf16")
ROUTERS = (
    None,
    RouterSpec(bias=True, compute="bf16", score_dtype="bf16", weight_dtype="bf16"),
    RouterSpec(
        score="sigmoid(logits)", selection_bias=True, groups=4, topk_group=2, renormalize=True, eps=1e-20, scale=2.5
    ),
    RouterSpec(
        score="sqrt(softplus(logits))", weight_from="choice", softmax_over_k=True, clamp_min=0.1, weight_dtype="f16"
    ),
)
GATES = (
    ("none", "gelu_tanh(a)"),
    ("concat", "mul(silu(a), b)"),
    ("interleaved", "div(a, b)"),
    ("separate", "mul(a, b)"),
)
SPECS = [
    KernelSpec(
        ExpertsSpec(
            ("f32", "bf16", "f16")[i % 3], gate, bias_in=bias, bias_out=bias, weight_on=on, stacked=i % 2 == 0,
            activation=phi,
        ),
        router,
    )
    for i, ((gate, phi), bias, on, router) in enumerate(
        itertools.product(GATES, (True, False), ("output", "input"), ROUTERS)
    )
]  # fmt: skip
CONFIGS = (
    GpuConfig(16, 32, 32),
    GpuConfig(128, 256, 64, combine="separate"),
    GpuConfig(16, 16, 256, variant="decode"),
)


def test_tiles_that_spill_elsewhere_are_smaller_where_they_would():
    """What offline compilation found at T = 4096: docs/kernels.md."""
    sizes = Sizes(4096, 2048, 768, 8, 2)
    coded = KernelSpec(ExpertsSpec("bf16", codes="fp8:128x128"), None, "bf16")
    tiles = {}
    for name in ("sm_75", "sm_90", "sm_100", "gfx942", "gfx1100", "gfx1201"):
        target = next(t for t in gpu_targets() if t.name == name)
        found = (default_config(spec, sizes, target) for spec in (MIXTRAL, coded))
        tiles[name] = [(c.block_m, c.block_n, c.block_k, c.num_warps) for c in found]
    assert tiles == {
        "sm_75": [(32, 64, 32, 4), (32, 64, 32, 4)],
        "sm_90": [(128, 256, 64, 8), (128, 128, 64, 8)],
        "sm_100": [(128, 256, 64, 8), (64, 128, 64, 4)],
        "gfx942": [(128, 256, 64, 8), (128, 128, 64, 8)],
        "gfx1100": [(128, 128, 64, 8), (64, 64, 64, 4)],
        "gfx1201": [(128, 128, 64, 8), (64, 64, 64, 4)],
    }


def test_golden():
    """After a wanted change: write the new text to the file and read the difference."""
    source = emit(MIXTRAL)
    assert source == GOLDEN.read_text()


@pytest.mark.parametrize(("name", "count", "depth"), [("sm_90", 128, 64), ("sm_75", 128, 32), ("sm_75", 256, 32)])
def test_a_router_without_matrix_instructions_takes_shallow_steps(name, count, depth):
    """At 64 and more its operands spill on sm_75: offline compilation."""
    sizes = Sizes(4096, 7168, 2048, count, 8)
    router = launches(MIXTRAL, sizes, default_config(MIXTRAL, sizes, gpu_target(name)))[0]
    assert (router.kernel, router.constexprs()["BLOCK_H"]) == ("router", depth)


SPECIALIZED = GpuConfig(128, 128, 64, combine="separate", weights="descriptors", programs=132, specialized=True)
SCHEDULES = (
    GpuConfig(16, 32, 32, programs=4),
    GpuConfig(16, 32, 32, weights="descriptors"),
    GpuConfig(16, 32, 32, weights="descriptors", programs=4, combine="separate"),
    SPECIALIZED,
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.variant}-{c.combine}")
def test_launches_fit_the_kernels_they_name(config):
    for spec in SPECS:
        functions = {f.name: f for f in ast.parse(emit(spec)).body if isinstance(f, ast.FunctionDef)}
        for entry in ("experts", "moe") if spec.router else ("experts",):
            for launch in launches(spec, Sizes(13, 40, 24, 8, 2), config, entry=entry):
                check_launch(functions[launch.kernel], launch)


def check_launch(function, launch):
    assert [a.arg for a in function.args.args] == [a.name for a in launch.arguments], launch.kernel
    assert [a.arg for a in function.args.args if a.annotation is not None] == list(launch.constexprs())


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda c: f"{c.weights}-{c.programs}-{c.specialized}")
def test_launches_of_other_schedules_fit_too(config):
    for spec in SPECS:
        functions = {f.name: f for f in ast.parse(emit(spec)).body if isinstance(f, ast.FunctionDef)}
        if config.weights == "descriptors" and not spec.experts.stacked:
            with pytest.raises(CodegenError, match="a tensor of its own"):
                launches(spec, Sizes(13, 64, 32, 8, 2), config)
            continue
        made = program(spec, Sizes(13, 64, 32, 8, 2), config)
        assert made.scratch == (config.weights == "descriptors")
        for launch in made.launches:
            check_launch(functions[launch.kernel], launch)
            if config.programs and launch.kernel in ("gate_up", "down"):
                assert launch.grid[0] <= config.programs


@pytest.mark.parametrize(
    ("sizes", "strides", "reason"),
    [
        (Sizes(13, 80, 64, 8, 2), None, "H=80 is no multiple of block_k=64"),
        (Sizes(13, 64, 64, 8, 2), (64 * 130, 65, 1), "the strides of 'out'"),
        (Sizes(13, 64, 64, 8, 2), (64 * 64, 1, 64), "the strides of 'out'"),
    ],
)
def test_weights_that_no_descriptor_takes(sizes, strides, reason):
    operands = contiguous(MIXTRAL, sizes)
    if strides:
        operands = replace(operands, params=(*operands.params[:-1], ("out", strides)))
    with pytest.raises(CodegenError, match=reason):
        launches(MIXTRAL, sizes, GpuConfig(128, 128, 64, weights="descriptors"), operands)


@pytest.mark.parametrize("target", [*gpu_targets(), GpuFigures("sm_103", 227 << 10, 148)], ids=lambda t: t.name)
def test_no_target_is_given_what_it_rejects(target):
    """Descriptors and specialised warps only where the target has them; a target nobody described has neither."""
    described = GpuConfig(128, 128, 64, weights="descriptors")
    has = target.has if isinstance(target, GpuTarget) else ()
    for config, needs in (
        (GpuConfig(16, 32, 32, programs=4), ()),
        (described, ("tma",)),
        (SPECIALIZED, ("tma", "wgmma")),
    ):
        if target.name == "sm_100":
            needs = [n.replace("wgmma", "tcgen05") for n in needs]
        if set(needs) <= set(has):
            assert check_target(config, target) is config
        else:
            with pytest.raises(CodegenError, match=f"{target.name} has no "):
                check_target(config, target)
    for T in (1, 7, 64, 4096):
        assert check_target(default_config(MIXTRAL, Sizes(T, 2048, 768, 128, 8), target), target)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_warps": 8}, "num_warps=8"),
        ({"block_m": 64}, "block_m=64"),
        ({"combine": "fused"}, "combine='separate'"),
        ({"weights": "pointers"}, "weights='descriptors'"),
        ({"programs": 0}, "programs>0"),
        ({"variant": "decode"}, "variant='decode'"),
        ({"weights": "tma"}, "weights='tma'"),
    ],
)
def test_schedules_that_compilers_ignore_or_refuse_are_errors(changes, reason):
    with pytest.raises(CodegenError, match=reason):
        replace(SPECIALIZED, **changes)


def test_gradients_are_not_scheduled():
    config = backward_config(SPECIALIZED)
    assert not config.needs
    assert not config.programs


def test_backward_launches_fit_the_kernels_they_name():
    for spec in SPECS:
        functions = {f.name: f for f in ast.parse(emit_backward(spec)).body if isinstance(f, ast.FunctionDef)}
        sizes = Sizes(13, 40, 24, 8, 2)
        config = backward_config(CONFIGS[1])
        wanted = Wanted(True, True, spec.experts.param_groups)
        made = backward_program(spec, sizes, config, contiguous(spec, sizes), wanted)
        results = {"grad", "x", "weights", "experts", "dx", "dweights", *(b.name for b in made.buffers)}
        results |= {f"d_{g}" for g in spec.experts.param_groups} | set(spec.experts.param_groups)
        for launch in made.launches:
            arguments = [a.arg for a in functions[launch.kernel].args.args]
            assert arguments == [a.name for a in launch.arguments], (spec, launch.kernel)
            pointers = {a.binding or a.name for a in launch.arguments if a.type.startswith("*")}
            assert pointers <= results, pointers - results


@pytest.mark.parametrize("write", [emit, emit_backward])
def test_no_line_is_long_and_no_name_is_unknown(write):
    for spec in SPECS:
        source = write(spec)
        tree = ast.parse(source)
        defined = {f.name for f in tree.body if isinstance(f, ast.FunctionDef)}
        called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert called <= defined | {"range", "float", "bool", "len"}, called - defined
        assert all(len(line) <= 130 for line in source.splitlines())


@pytest.mark.parametrize("T", [1, 2, 64, 4096])
def test_few_launches(T):
    sizes = Sizes(T, 2048, 768, 128, 8)
    made = launches(MIXTRAL, sizes, default_config(MIXTRAL, sizes))
    assert len(made) <= (3 if T <= 2 else 4)
    given = launches(MIXTRAL, sizes, default_config(MIXTRAL, sizes), entry="experts")
    assert len(given) == len(made) - (T < 4096)  # of many pairs a launch of its own counts those of each expert


@pytest.mark.parametrize("entry", ["moe", "experts"])
def test_row_tiles_cover_the_worst_choice_and_no_more_than_the_bound(entry):
    for T, E, k, rows in itertools.product((1, 7, 200), (1, 3, 512), (1, 3), (16, 64)):
        config = GpuConfig(rows, 32, 32)
        made = program(MIXTRAL, Sizes(T, 64, 32, E, min(k, E)), config, entry=entry)
        tiles = next(b.shape[0] for b in made.buffers if b.name == "tile_expert")
        pairs, hit = T * min(k, E), min(E, T * min(k, E))
        # One pair each; then whole tiles more: on one expert, unless a router's choices for a token differ.
        more, most = (pairs - hit) // rows, (T - 1) // rows * hit if entry == "moe" else pairs
        assert hit + min(more, most) <= tiles
        assert tiles * rows <= pairs + E * (rows - 1)
        assert tiles <= hit * -(-T // rows) or entry == "experts"


def constexprs(sizes, name, operands=None):
    config = GpuConfig(128, 128, 64)
    return next(s for s in launches(MIXTRAL, sizes, config, operands) if s.kernel == name).constexprs()


def test_offsets_are_wide_where_they_can_pass_two_to_the_31():
    small, tall = Sizes(4096, 4096, 14336, 8, 2), Sizes(600_000, 4096, 14336, 8, 2)
    assert not any(constexprs(small, "gate_up")[n] for n in ("WIDE_X", "WIDE_W"))
    assert constexprs(tall, "gate_up")["WIDE_X"]
    assert constexprs(tall, "router")["WIDE_X"]
    assert constexprs(tall, "down")["WIDE_H"]
    huge = Sizes(64, 16384, 80_000, 2, 1)
    assert constexprs(huge, "gate_up")["WIDE_W"]
    assert not constexprs(huge, "down")["WIDE_W"]
    strided = contiguous(MIXTRAL, small).__class__(**{**contiguous(MIXTRAL, small).__dict__, "x_strides": (1 << 20, 1)})
    assert constexprs(small, "gate_up", strided)["WIDE_X"]


def test_a_launch_describes_itself_for_the_compiler():
    launch = launches(MIXTRAL, Sizes(64, 2048, 768, 128, 8), GpuConfig(16, 128, 64))[2]
    assert launch.kernel == "gate_up"
    signature = launch.signature()
    assert (signature["x"], signature["order"], signature["m_tiles"]) == ("*bf16", "*i32", "i32")
    assert signature["BLOCK_M"] == "constexpr"
    assert launch.constexprs()["BLOCK_M"] == 16
    assert launch.attrs()[(0,)] == [["tt.divisibility", 16]]
    assert launch.options() == {"num_warps": 4, "num_stages": 3}


def test_errors_name_the_value():
    with pytest.raises(CodegenError, match="k=9"):
        launches(MIXTRAL, Sizes(1, 8, 8, 8, 9), GpuConfig(16, 32, 32))
    with pytest.raises(CodegenError, match="combine='twice'"):
        GpuConfig(16, 32, 32, combine="twice")
    with pytest.raises(CodegenError, match="reads b"):
        emit(KernelSpec(ExpertsSpec(gate="none")))
