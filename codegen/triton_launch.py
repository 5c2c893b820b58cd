"""The launches of one call: kernels, grids, arguments and buffers as values, for running and for offline compilation.

A spec's Triton module (`moec.codegen.triton_emit.emit(spec)`) holds the kernels; this file says which of them run, in
which order, over which grid, with which arguments. `moec.runtime_triton` executes it; to compile it without a GPU:

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    module = triton_emit.load(spec)                                  # a Python module, cached on disk
    for launch in launches(spec, Sizes(T, H, F, E, k), config):      # config: default_config(spec, sizes, target)
        fn = getattr(module, launch.kernel)                          # a triton.JITFunction
        source = ASTSource(fn, launch.signature(), launch.constexprs(), launch.attrs())
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options())

`launches` describes contiguous tensors unless it is given `Operands`. Which entry runs (`moe` with the router, or
`experts` without) follows from the spec, unless named. Pointers are described as 16-byte aligned, as PyTorch allocates.

Letters: T tokens, H hidden, F expert width, E experts, k experts a token; a pair is one (token, slot).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moec.codegen import triton_operands as ops
from moec.codegen.plan import Sizes
from moec.codegen.triton_config import GpuConfig
from moec.codegen.triton_operands import Operands
from moec.errors import CodegenError
from moec.spec import KernelSpec

_TYPES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i32": "i32", "i64": "i64"}
_WIDE = 2**31


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel: a pointer (`*bf16`, `*i64`), a number known at the call (`i32`) or a `constexpr`.

    A pointer is bound by its name: a tensor of the call or one of the program's buffers.
    """

    name: str
    type: str
    value: int | float | bool | None = None


@dataclass(frozen=True)
class Launch:
    """One launch of the kernel named `kernel` over `grid`."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Argument, ...]
    num_warps: int
    num_stages: int

    def signature(self) -> dict[str, str]:
        """Argument types by name, as triton.compiler.ASTSource takes them."""
        return {a.name: a.type for a in self.arguments}

    def constexprs(self) -> dict[str, Any]:
        """Values of the arguments that are known when the kernel is compiled."""
        return {a.name: a.value for a in self.arguments if a.type == "constexpr"}

    def attrs(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """What Triton may assume of pointers: that they are 16-byte aligned."""
        return {(i,): [["tt.divisibility", 16]] for i, a in enumerate(self.arguments) if a.type.startswith("*")}

    def options(self) -> dict[str, int]:
        """Options of triton.compile."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Buffer:
    """A tensor that a program needs between its launches; its contents are undefined before the first write."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """All of one call: its launches in order and the buffers they share."""

    launches: tuple[Launch, ...]
    buffers: tuple[Buffer, ...]


def launches(
    spec: KernelSpec, sizes: Sizes, config: GpuConfig, operands: Operands | None = None, entry: str | None = None
) -> tuple[Launch, ...]:
    """The launches of one forward call, in order. Raises CodegenError for sizes or values that no kernel takes."""
    return program(spec, sizes, config, operands, entry).launches


@lru_cache(maxsize=4096)
def program(
    spec: KernelSpec,
    sizes: Sizes,
    config: GpuConfig,
    operands: Operands | None = None,
    entry: str | None = None,
) -> Program:
    """The launches and buffers of one forward call; `entry` is moe (router and experts) or experts."""
    entry = entry or ("moe" if spec.router else "experts")
    if entry == "moe" and spec.router is None:
        raise CodegenError(f"moec::moe needs a spec with a router, got {str(spec)!r}")
    if min(sizes.T, sizes.k, sizes.E, sizes.H, sizes.F) < 1 or (entry == "moe" and sizes.k > sizes.E):
        raise CodegenError(f"{sizes}: expected T, H, F, E, k ≥ 1, and k ≤ E where a router chooses")
    if sizes.T * sizes.k >= _WIDE // 2:
        raise CodegenError(f"{sizes}: expected T·k < 2³⁰; split the batch")
    at = _At(spec, sizes, config, operands or ops.contiguous(spec, sizes), entry == "moe")
    if config.variant == "decode":
        return _decode(at)
    return _sorted(at)


@dataclass(frozen=True)
class _At:
    """What the launches of one call are worked out from."""

    spec: KernelSpec
    sizes: Sizes
    config: GpuConfig
    operands: Operands
    routed: bool

    @property
    def pairs(self) -> int:
        return self.sizes.T * self.sizes.k

    @property
    def m_tiles(self) -> int:
        """The most row tiles that any choice of experts makes: Σ ⌈count/BM⌉ ≤ (T·k + hit·(BM − 1)) / BM."""
        hit, rows = min(self.sizes.E, self.pairs), self.config.block_m
        return (self.pairs + hit * (rows - 1)) // rows

    @property
    def columns(self) -> int:
        """Columns of the first product: F for each projection."""
        return self.sizes.F * self.spec.experts.ab_views

    @property
    def wide_x(self) -> bool:
        """Whether an offset into x passes 2³¹."""
        row, column = self.operands.x_strides
        return (self.sizes.T - 1) * row + (self.sizes.H - 1) * column >= _WIDE

    def wide_w(self, *groups: str) -> bool:
        """Whether an offset into one expert's matrix passes 2³¹."""
        extents = {"out": (self.sizes.H, self.sizes.F)}
        for group in groups:
            _, row, column = self.operands.strides(group)
            rows, columns = extents.get(group, (self.columns, self.sizes.H))
            if (rows - 1) * row + (columns - 1) * column >= _WIDE:
                return True
        return False


def _sorted(at: _At) -> Program:
    steps = [_dispatch(at), _gate_up(at), _down(at)]
    if at.routed:
        steps.insert(0, _router(at))
    if at.config.combine == "separate":
        steps.append(_combine(at))
    s = at.sizes
    buffers = (
        Buffer("order", "i32", (at.pairs,)),
        Buffer("offsets", "i32", (s.E + 1,)),
        Buffer("tile_expert", "i32", (at.m_tiles,)),
        Buffer("tile_row", "i32", (at.m_tiles,)),
        Buffer("counters", "i32", (4,)),
        Buffer("h", at.spec.experts.dtype, (at.pairs, s.F)),
        Buffer("slots", at.spec.experts.dtype, (at.pairs, s.H)),
    )
    return Program(tuple(steps), buffers)


def _decode(at: _At) -> Program:
    steps = [_decode_gate_up(at), _decode_down(at)]
    if at.routed:
        steps.insert(0, _decode_logits(at))
    return Program(tuple(steps), (Buffer("h", at.spec.experts.dtype, (at.pairs, at.sizes.F)),))


def _pointer(name: str, dtype: str) -> Argument:
    return Argument(name, f"*{_TYPES[dtype]}")


def _consts(**values: int | float | bool) -> tuple[Argument, ...]:
    return tuple(Argument(name, "constexpr", value) for name, value in values.items())


def _power(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _ceil(n: int, to: int) -> int:
    return -(-n // to)


def _router_operands(at: _At) -> tuple[Argument, ...]:
    o, r = at.operands, at.spec.router
    assert r is not None
    return (
        _pointer("x", o.x_dtype),
        _pointer("router", o.router_dtype),
        *((_pointer("router_bias", o.router_bias_dtype),) if r.bias else ()),
    )


def _choice(at: _At) -> tuple[Argument, ...]:
    """The arguments that choosing experts takes, after the logits."""
    o, r = at.operands, at.spec.router
    assert r is not None
    return (
        *((_pointer("selection", o.selection_dtype),) if r.selection_bias else ()),
        _pointer("logits", r.compute),
        _pointer("weights", r.weight_dtype),
        _pointer("experts", "i64"),
    )


def _router_consts(at: _At) -> dict[str, int | bool]:
    o = at.operands
    return {
        "H": at.sizes.H, "E": at.sizes.E, "stride_x_t": o.x_strides[0], "stride_x_h": o.x_strides[1],
        "stride_router_e": o.router_strides[0], "stride_router_h": o.router_strides[1],
    }  # fmt: skip


def _choice_consts(at: _At) -> dict[str, int | bool]:
    s, r = at.sizes, at.spec.router
    assert r is not None
    return {
        "K": s.k, "BLOCK_E": max(16, _power(s.E)), "BLOCK_SLOTS": _power(s.k),
        "WIDE_CHOICE": r.selection_bias and at.operands.selection_dtype == "f32",
    }  # fmt: skip


def _router(at: _At) -> Launch:
    s, o = at.sizes, at.operands
    block_e = max(16, _power(s.E))
    block_t = 16 if block_e > 64 or s.T < 2048 else 32
    half = o.x_dtype == o.router_dtype != "f32"
    block_h, stages = _router_depth(block_t + block_e, 2 if half else 4, s.H)
    consts = _consts(
        **_router_consts(at), **_choice_consts(at), BLOCK_T=block_t, BLOCK_H=block_h,
        EVEN_H=s.H % block_h == 0, WIDE_X=at.wide_x, HALF=half,
    )  # fmt: skip
    arguments = (*_router_operands(at), *_choice(at), Argument("T", "i32", s.T), *consts)
    warps = 2 if block_t * block_e <= 512 else 8 if block_e > 256 else 4  # 4 warps spill on the least tile
    return Launch("router", (_ceil(s.T, block_t),), arguments, warps, stages)


def _router_depth(rows: int, item: int, hidden: int) -> tuple[int, int]:
    """(depth of a step, stages) whose operands fit the 64 KiB of shared memory that every GPU has."""
    depth = min(128 if item == 2 else 32, max(16, _power(hidden)))
    while depth > 16 and 2 * depth * rows * item > 56 << 10:
        depth //= 2
    return depth, 3 if 2 * depth * rows * item <= 56 << 10 else 2


def _dispatch(at: _At) -> Launch:
    s = at.sizes
    outputs = (_pointer(name, "i32") for name in ("order", "offsets", "tile_expert", "tile_row", "counters"))
    consts = _consts(
        E=s.E, BLOCK_E=_power(s.E + 1), BLOCK_PAIRS=min(1024, max(32, _power(at.pairs))), BLOCK_M=at.config.block_m
    )
    arguments = (_pointer("experts", "i64"), *outputs, Argument("pairs", "i32", at.pairs), *consts)
    return Launch("dispatch", (s.E,), arguments, 4, 1)


def _params(at: _At, first: bool) -> tuple[tuple[Argument, ...], dict[str, int | bool]]:
    """Pointers and strides of the parameter groups of the first or the second product."""
    s = at.spec.experts
    groups = [g for g in s.param_groups if (g in ("out", "bias_out")) != first]
    pointers = tuple(_pointer(g, s.dtype) if s.stacked else Argument(g, "*i64") for g in groups)
    strides: dict[str, int | bool] = {}
    for group in groups:
        axes = ("e", "n") if group.startswith("bias_") else ("e", "n", "k")
        values = at.operands.strides(group)
        strides |= {f"stride_{group}_{axis}": v for axis, v in zip(axes, values, strict=True)}
    return pointers, strides


def _tiles(at: _At) -> tuple[Argument, ...]:
    return tuple(_pointer(name, "i32") for name in ("order", "offsets", "tile_expert", "tile_row", "counters"))


def _gemm_consts(at: _At, depth: int) -> dict[str, int | bool]:
    c = at.config
    block_k = min(c.block_k, max(16, _power(depth)))
    return {
        "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": block_k, "GROUP_M": c.group_m,
        "EVEN_K": depth % block_k == 0,
    }  # fmt: skip


def _gate_up(at: _At) -> Launch:
    s, c, o = at.sizes, at.config, at.operands
    pointers, strides = _params(at, True)
    ours = [g for g in at.spec.experts.param_groups if g in ("a", "b", "ab")]
    n_tiles = _ceil(at.columns, c.block_n)
    on_input = at.spec.experts.weight_on == "input"
    weights = (_pointer("weights", o.weights_dtype),) if on_input else ()
    consts = _consts(
        H=s.H, F=s.F, K=s.k, stride_x_t=o.x_strides[0], stride_x_h=o.x_strides[1], **strides,
        **_gemm_consts(at, s.H), EVEN_N=at.columns % c.block_n == 0, WIDE_X=at.wide_x, WIDE_W=at.wide_w(*ours),
    )  # fmt: skip
    arguments = (
        _pointer("x", o.x_dtype), *weights, *pointers, *_tiles(at), _pointer("h", at.spec.experts.dtype),
        Argument("m_tiles", "i32", at.m_tiles), *consts,
    )  # fmt: skip
    return Launch("gate_up", (at.m_tiles * n_tiles,), arguments, c.num_warps, c.num_stages)


def _combine_shape(at: _At) -> tuple[int, int, int]:
    """Tokens and columns of a block that adds slots, and how many such blocks there are."""
    columns = min(256, _power(at.sizes.H))
    tokens = min(max(1, 32 * 128 // columns), _power(at.sizes.T))
    return tokens, columns, _ceil(at.sizes.T, tokens) * _ceil(at.sizes.H, columns)


def _combined(at: _At) -> tuple[tuple[Argument, ...], dict[str, int | bool]]:
    """The arguments that adding slots takes."""
    o = at.operands
    weights = (_pointer("weights", o.weights_dtype),) if at.spec.experts.weight_on == "output" else ()
    tokens, columns, _ = _combine_shape(at)
    numbers: dict[str, int | bool] = {"H": at.sizes.H, "E": at.sizes.E, "K": at.sizes.k}
    blocks = {"BLOCK_TOKENS": tokens, "BLOCK_COLUMNS": columns}
    return (_pointer("experts", "i64"), *weights, _pointer("y", at.spec.y_dtype)), {**numbers, **blocks}


def _down(at: _At) -> Launch:
    s, c = at.sizes, at.config
    pointers, strides = _params(at, False)
    n_tiles = _ceil(s.H, c.block_n)
    fused = c.combine == "fused"
    extra, numbers = _combined(at)
    consts = _consts(
        **numbers, F=s.F, **strides, **_gemm_consts(at, s.F), EVEN_N=s.H % c.block_n == 0,
        WIDE_H=at.pairs * s.F >= _WIDE, WIDE_W=at.wide_w("out"), FUSED=fused,
    )  # fmt: skip
    dtype = at.spec.experts.dtype
    arguments = (
        _pointer("h", dtype), *pointers, *_tiles(at), _pointer("slots", dtype), *extra,
        Argument("T", "i32", s.T), Argument("m_tiles", "i32", at.m_tiles), *consts,
    )  # fmt: skip
    blocks = at.m_tiles * n_tiles + (_combine_shape(at)[2] if fused else 0)
    return Launch("down", (blocks,), arguments, c.num_warps, c.num_stages)


def _combine(at: _At) -> Launch:
    extra, numbers = _combined(at)
    dtype = at.spec.experts.dtype
    arguments = (_pointer("slots", dtype), *extra, Argument("T", "i32", at.sizes.T), *_consts(**numbers))
    return Launch("combine", (_combine_shape(at)[2],), arguments, 4, 1)


def _decode_logits(at: _At) -> Launch:
    s = at.sizes
    block_e = 1 if s.E <= 64 else 2
    block_h = min(1024, max(64, _power(s.H)))
    assert at.spec.router is not None
    consts = _consts(**_router_consts(at), BLOCK_E=block_e, BLOCK_H=block_h)
    logits = _pointer("logits", at.spec.router.compute)
    return Launch("decode_logits", (_ceil(s.E, block_e), s.T), (*_router_operands(at), logits, *consts), 4, 1)


def _gemv_consts(at: _At, depth: int) -> dict[str, int | bool]:
    block_k = min(at.config.block_k, max(16, _power(depth)))
    return {"BLOCK_N": at.config.block_n, "BLOCK_K": block_k}


def _decode_gate_up(at: _At) -> Launch:
    s, c, o = at.sizes, at.config, at.operands
    pointers, strides = _params(at, True)
    routing: tuple[Argument, ...]
    if at.routed:
        routing, numbers = _choice(at), _choice_consts(at)
    else:
        weights = (_pointer("weights", o.weights_dtype),) if at.spec.experts.weight_on == "input" else ()
        routing, numbers = (*weights, _pointer("experts", "i64")), {"K": s.k}
    consts = _consts(
        H=s.H, F=s.F, E=s.E, **numbers, stride_x_t=o.x_strides[0], stride_x_h=o.x_strides[1], **strides,
        **_gemv_consts(at, s.H),
    )  # fmt: skip
    kernel = "decode_route_gate_up" if at.routed else "decode_gate_up"
    h = _pointer("h", at.spec.experts.dtype)
    grid = (_ceil(s.F, c.block_n), s.k, s.T)
    return Launch(kernel, grid, (_pointer("x", o.x_dtype), *routing, *pointers, h, *consts), c.num_warps, 1)


def _decode_down(at: _At) -> Launch:
    s, c = at.sizes, at.config
    pointers, strides = _params(at, False)
    weights = (_pointer("weights", at.operands.weights_dtype),) if at.spec.experts.weight_on == "output" else ()
    block_n = max(16, c.block_n // 2)
    consts = _consts(H=s.H, F=s.F, E=s.E, K=s.k, **strides, **_gemv_consts(at, s.F) | {"BLOCK_N": block_n})
    arguments = (
        _pointer("h", at.spec.experts.dtype), *weights, _pointer("experts", "i64"), *pointers,
        _pointer("y", at.spec.y_dtype), *consts,
    )  # fmt: skip
    return Launch("decode_down", (_ceil(s.H, block_n), s.T), arguments, c.num_warps, 1)
