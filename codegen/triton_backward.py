"""The launches of one backward call: slopes, rows, tokens and parameters, over the row tiles of a new dispatch.

Nothing is kept from the forward pass: φ's inputs are computed anew. Gradients that nobody wants are not computed.
Letters: T tokens, H hidden, F expert width, E experts, k experts a token; a pair is one (token, slot).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from moec.codegen import triton_call as forward
from moec.codegen import triton_operands as ops
from moec.codegen.plan import Sizes
from moec.codegen.triton_call import Argument, Buffer, Launch, Program
from moec.codegen.triton_config import GpuConfig
from moec.codegen.triton_operands import Operands
from moec.spec import KernelSpec


@dataclass(frozen=True)
class Wanted:
    """Which gradients are: by x, by the routing weights, by each parameter group."""

    x: bool
    weights: bool
    groups: tuple[str, ...]


def backward_config(config: GpuConfig) -> GpuConfig:
    """The configuration of a backward call whose forward call has `config`: three products a tile want smaller ones."""
    few = config.variant == "decode"
    return replace(
        config,
        block_m=16 if few else min(config.block_m, 64),
        block_n=64 if few else min(config.block_n, 64),
        block_k=min(config.block_k, 32),
        num_warps=8 if config.block_m >= 64 and not few else 4,  # 4 warps spill on sm_80: three sums of 64 × 64
        num_stages=min(config.num_stages, 2),
        variant="sorted",
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
    steps = [forward.dispatch(at), _hidden(at)]
    if wanted.x or (wanted.weights and spec.experts.weight_on == "input"):
        steps.append(_rows(at))
    if wanted.x or wanted.weights:
        steps.append(_tokens(at, columns, wanted.x or spec.experts.weight_on == "input"))
    steps += _params(at, wanted.groups)
    dtype, pairs = spec.experts.dtype, at.pairs
    buffers = (
        *forward.tile_buffers(at),
        *(Buffer(name, dtype, (pairs, sizes.F)) for name in ("h", *slope_names(spec))),
        Buffer("slots", dtype, (pairs, sizes.H)),
        Buffer("parts", "f32", (pairs, columns)),
    )
    return Program(tuple(steps), buffers)


def slope_names(spec: KernelSpec) -> tuple[str, ...]:
    """The gradients by φ's inputs."""
    return ("da", "db")[: spec.experts.ab_views]


def _groups(spec: KernelSpec, first: bool) -> list[str]:
    return [g for g in spec.experts.param_groups if (g in ("out", "bias_out")) != first]


def _matrices(spec: KernelSpec) -> list[str]:
    return [g for g in _groups(spec, True) if not g.startswith("bias_")]


def _hidden(at: forward.At) -> Launch:
    s, c, o = at.sizes, at.config, at.operands
    first, strides = forward.param_arguments(at, True)
    last, more = forward.param_arguments(at, False)
    dtype = at.spec.experts.dtype
    consts = forward.constants(
        H=s.H, F=s.F, K=s.k, stride_x_t=o.x_strides[0], stride_x_h=o.x_strides[1], **strides, **more,
        **forward.gemm_consts(at, s.H), WIDE_X=at.wide_x or s.T * s.H >= forward.WIDE,
        WIDE_W=at.wide_w(*_matrices(at.spec), "out"),
    )  # fmt: skip
    results = (forward.pointer(name, dtype) for name in ("h", *slope_names(at.spec)))
    arguments = (
        forward.pointer("grad", at.spec.y_dtype), forward.pointer("x", o.x_dtype),
        forward.pointer("weights", o.weights_dtype), *first, *last, *forward.tile_pointers(at), *results,
        forward.pointer("parts", "f32"), Argument("m_tiles", "i32", at.m_tiles), *consts,
    )  # fmt: skip
    blocks = at.m_tiles * forward.ceil_div(s.F, c.block_n)
    return Launch("backward_hidden", (blocks,), arguments, c.num_warps, c.num_stages)


def _rows(at: forward.At) -> Launch:
    s, c = at.sizes, at.config
    dtype, matrices = at.spec.experts.dtype, _matrices(at.spec)
    pointers, strides = forward.param_arguments(at, True)
    slopes = (forward.pointer(name, dtype) for name in slope_names(at.spec))
    kept = {n: v for n, v in strides.items() if not n.startswith("stride_bias_")}
    consts = forward.constants(
        H=s.H, F=s.F, **kept, **forward.gemm_consts(at, s.F), WIDE_W=at.wide_w(*matrices),
    )  # fmt: skip
    arguments = (
        *slopes, *(p for p in pointers if p.name in matrices), *forward.tile_pointers(at),
        forward.pointer("slots", dtype),
        Argument("m_tiles", "i32", at.m_tiles), *consts,
    )  # fmt: skip
    return Launch(
        "backward_rows", (at.m_tiles * forward.ceil_div(s.H, c.block_n),), arguments, c.num_warps, c.num_stages
    )


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
        forward.pointer("parts", "f32"), forward.pointer("dx", "f32"), forward.pointer("dweights", "f32"),
    )  # fmt: skip
    arguments = (*pointers, Argument("T", "i32", s.T), *consts)
    return Launch("backward_tokens", (forward.ceil_div(s.T, tokens),), arguments, 4, 1)


def _params(at: forward.At, groups: Sequence[str]) -> list[Launch]:
    """One launch for each of φ's inputs and one for the output's matrix, where they or their biases are wanted."""
    steps: list[Launch] = []
    for name, matrix, start, step in projections(at.spec):
        bias = f"bias_{matrix}"
        if matrix in groups or bias in groups:
            steps.append(_outer(at, groups, name, matrix, bias, (start, step)))
    if "out" in groups or "bias_out" in groups:
        steps.append(_outer(at, groups, "grad", "out", "bias_out", (0, 1)))
    return steps


def projections(spec: KernelSpec) -> tuple[tuple[str, str, int | str, int], ...]:
    """(slope, matrix, its first row, rows from one to the next) of each input of φ; a first row F is the width."""
    gate = spec.experts.gate
    if gate == "separate":
        return (("da", "a", 0, 1), ("db", "b", 0, 1))
    if gate == "concat":
        return (("da", "ab", 0, 1), ("db", "ab", "F", 1))
    if gate == "interleaved":
        return (("da", "ab", 0, 2), ("db", "ab", 1, 2))
    return (("da", "ab", 0, 1),)


def _outer(
    at: forward.At, groups: Sequence[str], left: str, matrix: str, bias: str, place: tuple[int | str, int]
) -> Launch:
    s, c, o, e = at.sizes, at.config, at.operands, at.spec.experts
    into = dict(ops.contiguous(at.spec, s).params)
    of_out = matrix == "out"
    rows, columns = (s.H, s.F) if of_out else (s.F, s.H)
    right = "h" if of_out else "x"
    right_strides = (s.F, 1) if of_out else o.x_strides
    has_bias = bias in groups
    dtypes = {"grad": at.spec.y_dtype, "x": o.x_dtype}
    target = f"d_{bias}" if has_bias else f"d_{matrix}"
    consts = forward.constants(
        K=s.k, ROWS=rows, COLUMNS=columns, stride_left_r=rows, stride_left_c=1,
        stride_right_r=right_strides[0], stride_right_c=right_strides[1],
        LEFT_TOKENS=of_out, RIGHT_TOKENS=not of_out,
        LEFT_WEIGHTED=of_out and e.weight_on == "output", RIGHT_WEIGHTED=not of_out and e.weight_on == "input",
        stride_dw_e=into[matrix][0], stride_dw_n=into[matrix][1], stride_dw_k=into[matrix][2],
        stride_dbias_e=into[bias][0] if has_bias else 0, stride_dbias_n=1,
        FROM=s.F if place[0] == "F" else int(place[0]), STEP=place[1], MATRIX=matrix in groups, BIAS=has_bias,
        BLOCK_M=c.block_n, BLOCK_N=c.block_n, BLOCK_K=16 if e.dtype == "f32" else 32,
    )  # fmt: skip

    def result(name: str, binding: str) -> Argument:
        kind = forward.pointer(name, e.dtype) if e.stacked else Argument(name, "*i64")
        return replace(kind, binding=binding)

    matrix_into = f"d_{matrix}" if matrix in groups else target
    arguments = (
        replace(forward.pointer("left", dtypes.get(left, e.dtype)), binding=left),
        replace(forward.pointer("right", dtypes.get(right, e.dtype)), binding=right),
        forward.pointer("weights", o.weights_dtype), result("dw", matrix_into), result("dbias", target),
        forward.pointer("order", "i32"), forward.pointer("offsets", "i32"), *consts,
    )  # fmt: skip
    tiles = forward.ceil_div(rows, c.block_n) * forward.ceil_div(columns, c.block_n)
    return Launch("backward_params", (tiles, s.E), arguments, 4, 2)
