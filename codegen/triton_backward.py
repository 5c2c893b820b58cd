"""The launches of one backward call: rows in the order of experts, slopes, rows, tokens and parameters.

φ's inputs are computed anew, over the row tiles of a new dispatch. Gradients that nobody wants are not computed.
Letters: T tokens, H hidden, F expert width, O output width, E experts, k experts a token; a pair is one (token, slot).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from moec.codegen import triton_call as forward
from moec.codegen import triton_operands as ops
from moec.codegen.plan import Sizes
from moec.codegen.triton_call import Argument, Buffer, Launch, Program
from moec.codegen.triton_config import GpuConfig, sorted_config
from moec.codegen.triton_operands import Operands
from moec.codegen.triton_route import dispatch, routing_buffers
from moec.ir.spec import KernelSpec


@dataclass(frozen=True)
class Wanted:
    """Which gradients are: by x, by the routing weights, by each parameter group.

    saved: the call is given what φ read as `inputs`, a row a pair.
    step: all at once, or only what comes before (`last`) or behind (`first`) the gradients by φ's inputs, which the
    call is given as `dinputs` then: named after the product whose gradients it has
    """

    x: bool
    weights: bool
    groups: tuple[str, ...]
    saved: bool = False
    step: str = ""


def backward_config(config: GpuConfig) -> GpuConfig:
    """The configuration of a backward call whose forward call has `config`: the same tiles, read by pointers."""
    config = sorted_config(config)
    return replace(
        config,
        block_k=min(config.block_k, 64),
        combine="fused",
        weights="pointers",
        programs=0,
        specialized=False,
    )


@lru_cache(maxsize=4096)
def backward_program(spec: KernelSpec, sizes: Sizes, config: GpuConfig, operands: Operands, wanted: Wanted) -> Program:
    """The launches and buffers of one backward call. Buffers named d… and the tensors of `wanted` are its results."""
    at = forward.at(spec, sizes, config, operands)
    columns = forward.ceil_div(sizes.F, config.block_n)
    x_wanted = not wanted.saved or any(g not in ("out", "bias_out") for g in wanted.groups)
    rows = [forward.permute(at, into="x_rows")] if x_wanted else []
    steps = [*dispatch(at)]
    if wanted.step != "first":
        steps.append(forward.permute(at, "grad", "grad_rows"))
        if not wanted.saved:
            steps += [*rows, *_inputs(at)]
            rows = []
        steps.append(_hidden(at, wanted.saved))
    # What is read last comes last: rows of y's gradient, of x and of dx are then in one place after one another.
    of_last, of_first = _params(at, wanted.groups)
    steps += [*of_last, *(rows if wanted.step != "last" else []), *of_first]
    on_input = spec.experts.weight_on == "input"
    if wanted.x or (wanted.weights and on_input):
        steps.append(_rows(at))
    if wanted.x or wanted.weights:
        steps.append(_tokens(at, columns if wanted.weights else 0, wanted.x or on_input))
    dtype, pairs = spec.experts.dtype, at.pairs
    buffers = (
        *routing_buffers(at),
        *forward.tile_buffers(at),
        Buffer("grad_rows", dtype, (pairs, sizes.O)),
        Buffer("x_rows", dtype, (pairs, sizes.H)),
        Buffer("h", dtype, (pairs, sizes.F)),
        *(() if wanted.step else (Buffer("dinputs", dtype, (pairs, at.columns)),)),
        Buffer("slots", dtype, (pairs, sizes.H)),
        Buffer("parts", "f32", (pairs, columns)),
    )
    used = {name for step in steps for name in step.pointers}
    return Program(tuple(steps), tuple(buffer for buffer in buffers if buffer.name in used))


def _groups(spec: KernelSpec, first: bool) -> list[str]:
    return [g for g in spec.experts.param_groups if (g in ("out", "bias_out")) != first]


def matrices(spec: KernelSpec) -> list[str]:
    """The matrices of the first product, in the order of their columns among φ's inputs."""
    return [g for g in _groups(spec, True) if not g.startswith("bias_")]


def _grouped(at: forward.At, kernel: str, columns: int, arguments: Sequence[Argument], **numbers: int) -> Launch:
    """A product over row tiles with `columns` columns."""
    c = at.config
    consts = forward.constants(**numbers, EVEN_N=columns % c.block_n == 0)
    grid = (at.m_tiles * forward.ceil_div(columns, c.block_n),)
    return Launch(
        kernel, grid, (*arguments, Argument("m_tiles", "i32", at.m_tiles), *consts), c.num_warps, c.num_stages
    )


def _inputs(at: forward.At) -> list[Launch]:
    """What φ reads, anew: a launch a matrix."""
    s, e = at.sizes, at.spec.experts
    pointers, strides = forward.param_arguments(at, True)
    named = {p.name: p for p in pointers}
    steps: list[Launch] = []
    for turn, matrix in enumerate(matrices(at.spec)):
        width = at.columns // len(matrices(at.spec))
        bias = f"bias_{matrix}"
        own = {f"stride_matrix_{axis}": strides[f"stride_{matrix}_{axis}"] for axis in "enk"}
        more = {f"stride_bias_in_{axis}": strides[f"stride_{bias}_{axis}"] for axis in "en"} if e.bias_in else {}
        arguments = (
            replace(forward.pointer("rows", e.dtype), binding="x_rows"),
            replace(named[matrix], name="matrix", binding=matrix),
            *((replace(named[bias], name="bias_in", binding=bias),) if e.bias_in else ()),
            *forward.tile_pointers(at),
            replace(forward.pointer("inputs", e.dtype), binding="dinputs"),
        )
        numbers = {"H": s.H, "N": width, "WIDTH": at.columns, "FROM": turn * width, **own, **more}
        consts = {**numbers, **forward.gemm_consts(at, s.H), "WIDE_W": at.wide_w(matrix)}
        steps.append(_grouped(at, "backward_inputs", width, arguments, **consts))
    return steps


def _hidden(at: forward.At, saved: bool) -> Launch:
    s, e = at.sizes, at.spec.experts
    last, strides = forward.param_arguments(at, False)
    hidden = "h" if e.out else "dinputs"  # without a second product h is not kept
    arguments = (
        replace(forward.pointer("rows", e.dtype), binding="grad_rows"),
        forward.pointer("weights", at.operands.weights_dtype), *last, *forward.tile_pointers(at),
        replace(forward.pointer("inputs", e.dtype), binding="inputs" if saved else "dinputs"),
        forward.pointer("dinputs", e.dtype), replace(forward.pointer("h", e.dtype), binding=hidden),
        forward.pointer("parts", "f32"),
    )  # fmt: skip
    consts = {
        "O": s.O, "F": s.F, "WIDTH": at.columns, "SAVED": saved, **strides, **forward.gemm_consts(at, s.O),
        "WIDE_W": e.out and at.wide_w("out"),
    }  # fmt: skip
    return _grouped(at, "backward_hidden", s.F, arguments, **consts)


def _rows(at: forward.At) -> Launch:
    s, ours = at.sizes, matrices(at.spec)
    pointers, strides = forward.param_arguments(at, True)
    dtype = at.spec.experts.dtype
    arguments = (
        forward.pointer("dinputs", dtype), *(p for p in pointers if p.name in ours), *forward.tile_pointers(at),
        forward.pointer("slots", dtype),
    )  # fmt: skip
    kept = {n: v for n, v in strides.items() if not n.startswith("stride_bias_")}
    consts = {
        "H": s.H, "WIDTH": at.columns, **kept, **forward.gemm_consts(at, at.columns // len(ours)),
        "WIDE_W": at.wide_w(*ours),
    }  # fmt: skip
    return _grouped(at, "backward_rows", s.H, arguments, **consts)


def _tokens(at: forward.At, parts: int, rows: bool) -> Launch:
    s, o = at.sizes, at.operands
    columns = min(256, forward.power_of_two(s.H))
    tokens = min(max(1, 4096 // columns), forward.power_of_two(s.T))
    consts = forward.constants(
        H=s.H, E=s.E, K=s.k, stride_x_t=o.x_strides[0], stride_x_h=o.x_strides[1], PARTS=parts,
        BLOCK_PARTS=forward.power_of_two(parts), BLOCK_TOKENS=tokens, BLOCK_COLUMNS=columns, ROWS=rows,
    )  # fmt: skip
    pointers = (
        forward.pointer("slots", at.spec.experts.dtype), forward.pointer("x", o.x_dtype),
        forward.pointer("weights", o.weights_dtype), forward.pointer("experts", "i64"),
        forward.pointer("parts", "f32"), forward.pointer("dx", o.x_dtype), forward.pointer("dweights", "f32"),
    )  # fmt: skip
    arguments = (*pointers, Argument("T", "i32", s.T), *consts)
    return Launch("backward_tokens", (forward.ceil_div(s.T, tokens),), arguments, 4, 1)


def _params(at: forward.At, groups: Sequence[str]) -> tuple[list[Launch], list[Launch]]:
    """One launch for each matrix of which a gradient is wanted, or of its bias: of the last product, of the first."""
    ours = matrices(at.spec)
    width = at.columns // len(ours)
    first = [
        _outer(at, groups, matrix, (width, at.sizes.H), turn * width)
        for turn, matrix in enumerate(ours)
        if matrix in groups or f"bias_{matrix}" in groups
    ]
    last = "out" in groups or "bias_out" in groups
    return [_outer(at, groups, "out", (at.sizes.O, at.sizes.F), 0)] if last else [], first


def _outer_tile(at: forward.At) -> tuple[int, int, int, int]:
    """Rows and columns of a tile of a gradient, depth of a step, warps: the matrix is large, rows may be few."""
    c = at.config
    if at.spec.experts.dtype == "f32":
        return 64, 64, 16, 4
    rows = -(-at.pairs // min(at.sizes.E, at.pairs))
    return 128, max(128, c.block_n) if c.num_warps == 8 else 128, 64 if rows > 32 else 32, 8


def _outer(at: forward.At, groups: Sequence[str], matrix: str, extent: tuple[int, int], start: int) -> Launch:
    """The gradient of `matrix` [rows, columns], and of its bias."""
    s, o, e = at.sizes, at.operands, at.spec.experts
    into = dict(ops.contiguous(at.spec, s).params)
    of_out, bias = matrix == "out", f"bias_{matrix}"
    rows, columns = extent
    block_m, block_n, block_k, warps = _outer_tile(at)
    has_bias = bias in groups
    target = f"d_{bias}" if has_bias else f"d_{matrix}"
    consts = forward.constants(
        ROWS=rows, COLUMNS=columns, stride_left=s.O if of_out else at.columns, FROM=start,
        BIAS_WEIGHTED=of_out and e.weight_on == "output",
        stride_dw_e=into[matrix][0], stride_dw_n=into[matrix][1], stride_dw_k=into[matrix][2],
        stride_dbias_e=into[bias][0] if has_bias else 0, stride_dbias_n=1, MATRIX=matrix in groups, BIAS=has_bias,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=8,
        EVEN=rows % block_m == 0 and columns % block_n == 0,
    )  # fmt: skip

    def result(name: str, binding: str) -> Argument:
        kind = forward.pointer(name, e.stored(binding.removeprefix("d_"))) if e.stacked else Argument(name, "*i64")
        return replace(kind, binding=binding)

    arguments = (
        replace(forward.pointer("left", e.dtype), binding="grad_rows" if of_out else "dinputs"),
        replace(forward.pointer("right", e.dtype), binding="h" if of_out else "x_rows"),
        forward.pointer("weights", o.weights_dtype), result("dw", f"d_{matrix}" if matrix in groups else target),
        result("dbias", target), forward.pointer("order", "i32"), forward.pointer("offsets", "i32"), *consts,
    )  # fmt: skip
    tiles = forward.ceil_div(rows, block_m) * forward.ceil_div(columns, block_n)
    return Launch("backward_params", (tiles, s.E), arguments, warps, at.config.num_stages)
