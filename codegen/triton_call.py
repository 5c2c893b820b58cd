"""What launches are made of: arguments, launches, buffers and programs as values, and the parts that several share.

Letters: T tokens, H hidden, F expert width, E experts, k experts a token; a pair is one (token, slot).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from moec.codegen import triton_operands as ops
from moec.codegen.plan import Sizes, up
from moec.codegen.triton_config import GpuConfig
from moec.codegen.triton_operands import Operands
from moec.errors import CodegenError
from moec.ir.bounds import Choices, Size, most
from moec.ir.dtypes import BUFFERS
from moec.ir.spec import KernelSpec

_TYPES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i32": "i32", "i64": "i64", "int8": "i8", "fp8": "u8"}
WIDE = 2**31
"""Offsets from here on want 64 bits."""


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel: a pointer (`*bf16`, `*i64`), a number known at the call (`i32`) or a `constexpr`.

    A pointer is bound to a tensor of the call or one of the program's buffers: by `binding`, else by its own name.
    """

    name: str
    type: str
    value: int | float | bool | None = None
    binding: str = ""


@dataclass(frozen=True)
class Launch:
    """One launch of the kernel named `kernel` over `grid`; its pointers come before its other arguments."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Argument, ...]
    num_warps: int
    num_stages: int

    @property
    def pointers(self) -> tuple[str, ...]:
        """What the pointers are bound to: names of a call's tensors and of its program's buffers, in order."""
        return tuple(a.binding or a.name for a in self.arguments if a.type.startswith("*"))

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
    """A tensor that a program needs between its launches; before the first write it holds anything, or zeros."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    zeros: bool = False

    @property
    def bytes(self) -> int:
        """Its size; an expression where T is a symbol."""
        return math.prod(self.shape) * BUFFERS[self.dtype].itemsize


@dataclass(frozen=True)
class Program:
    """All of one call: its launches in order and the buffers they share; scratch: kernels ask Triton for memory."""

    launches: tuple[Launch, ...]
    buffers: tuple[Buffer, ...]
    scratch: bool = False


def places(program: Program, aligned: int) -> tuple[tuple[int, ...], int]:
    """Where in one block each buffer begins, in bytes, and what the block takes: buffers that no launch needs at the
    same time may lie at the same place."""
    lives = [_life(program, buffer) for buffer in program.buffers]
    sizes = [up(buffer.bytes, aligned) for buffer in program.buffers]
    begins: dict[int, int] = {}
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        begin = 0
        for other in sorted((j for j in begins if _meet(lives[i], lives[j])), key=begins.__getitem__):
            if begin + sizes[i] <= begins[other]:
                break
            begin = max(begin, begins[other] + sizes[other])
        begins[i] = begin
    end = max((begins[i] + sizes[i] for i in begins), default=0)
    return tuple(begins[i] for i in range(len(sizes))), end


def _life(program: Program, buffer: Buffer) -> tuple[int, int]:
    """The first and the last launch that needs a buffer; zeros are written before the first of all."""
    using = [i for i, launch in enumerate(program.launches) if buffer.name in launch.pointers]
    return (0 if buffer.zeros else min(using, default=0), max(using, default=0))


def _meet(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


@dataclass(frozen=True)
class At:
    """What the launches of one call are worked out from."""

    spec: KernelSpec
    sizes: Sizes
    config: GpuConfig
    operands: Operands
    routed: bool
    capacity: Size | None = None
    save: bool = False

    @property
    def pairs(self) -> int:
        return self.sizes.T * self.sizes.k

    @property
    def choices(self) -> Choices:
        """What bounds rows and tiles; a router's choices for a token differ."""
        s = self.sizes
        return Choices(s.T, s.E, s.k, distinct=self.routed, limit=self.capacity)

    @property
    def rows(self) -> int:
        """The most pairs that have an expert, at least 1."""
        return self._some(self.choices.kept)

    @property
    def m_tiles(self) -> int:
        """The most row tiles that any choice of experts makes, at least 1."""
        return self._some(self.choices.tiles(self.config.block_m))

    def _some(self, count: Size) -> Size:
        """At least 1: a capacity may be 0, but no tensor that kernels are given is empty."""
        return count if self.capacity is None else most(1, count)

    @property
    def atomic(self) -> bool:
        """Whether tiles add to one row a token, in any order."""
        return self.config.combine == "atomic" and self.spec.experts.out

    @property
    def columns(self) -> int:
        """Columns of the first product: F for each projection."""
        return self.sizes.F * self.spec.experts.ab_views

    @property
    def wide_x(self) -> bool:
        """Whether an offset into x passes 2³¹."""
        row, column = self.operands.x_strides
        return (self.sizes.T - 1) * row + (self.sizes.H - 1) * column >= WIDE

    @property
    def wide_router(self) -> bool:
        """Whether an offset into the router's matrix passes 2³¹."""
        row, column = self.operands.router_strides
        return (self.sizes.E - 1) * row + (self.sizes.H - 1) * column >= WIDE

    def wide_w(self, *groups: str) -> bool:
        """Whether an offset into one expert's matrix passes 2³¹."""
        extents = {"out": (self.sizes.O, self.sizes.F)}
        for group in groups:
            _, row, column = self.operands.strides(group)
            rows, columns = extents.get(group, (self.columns, self.sizes.H))
            if (rows - 1) * row + (columns - 1) * column >= WIDE:
                return True
        return False


def at(
    spec: KernelSpec,
    sizes: Sizes,
    config: GpuConfig,
    operands: Operands | None = None,
    entry: str | None = "experts",
    capacity: int | None = None,
    save: bool = False,
) -> At:
    """What the launches of one call are worked out from; raises CodegenError for sizes that no kernel takes."""
    entry = entry or ("moe" if spec.router else "experts")
    if entry == "moe" and spec.router is None:
        raise CodegenError(f"moec::moe needs a spec with a router, got {str(spec)!r}")
    if min(sizes.T, sizes.k, sizes.E, sizes.H, sizes.F, sizes.O) < 1 or (entry == "moe" and sizes.k > sizes.E):
        raise CodegenError(f"{sizes}: expected T, H, F, O, E, k ≥ 1, and k ≤ E where a router chooses")
    if not spec.experts.out and sizes.O != sizes.F:
        raise CodegenError(f"{sizes}: experts without an output matrix give F numbers; expected O={sizes.F}")
    if sizes.T * sizes.k >= WIDE // 2:
        raise CodegenError(f"{sizes}: expected T·k < 2³⁰; split the batch")
    return At(spec, sizes, config, operands or ops.contiguous(spec, sizes), entry == "moe", capacity, save)


def pointer(name: str, dtype: str) -> Argument:
    return Argument(name, f"*{_TYPES[dtype]}")


def constants(**values: int | float | bool) -> tuple[Argument, ...]:
    return tuple(Argument(name, "constexpr", value) for name, value in values.items())


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def lanes(warps: int) -> int:
    """Threads of so many warps, at most: AMD's may have 64."""
    return 64 * warps


def ceil_div(n: int, to: int) -> int:
    return -(-n // to)


def tile_buffers(at: At) -> tuple[Buffer, ...]:
    """What dispatch writes: pairs by expert, where experts begin, the row tiles, and counters."""
    return (
        Buffer("order", "i32", (at.rows,)),
        Buffer("offsets", "i32", (at.sizes.E + 1,)),
        Buffer("tile_expert", "i32", (at.m_tiles,)),
        Buffer("tile_row", "i32", (at.m_tiles,)),
        Buffer("counters", "i32", (7,)),
    )


def tile_pointers(at: At) -> tuple[Argument, ...]:
    return tuple(pointer(name, "i32") for name in ("order", "offsets", "tile_expert", "tile_row", "counters"))


def param_arguments(at: At, first: bool) -> tuple[tuple[Argument, ...], dict[str, int | bool]]:
    """Pointers and strides of the parameter groups of the first or the second product."""
    s = at.spec.experts
    groups = [g for g in s.param_groups if g.endswith("out") != first]
    pointers = tuple(_param(at, g) if s.stacked else Argument(g, "*i64") for g in groups)
    strides: dict[str, int | bool] = {}
    for group in groups:
        axes = ("e", "n") if group.startswith("bias_") else ("e", "n", "k")
        values = at.operands.strides(group)
        strides |= {f"stride_{group}_{axis}": v for axis, v in zip(axes, values, strict=True)}
    return pointers, strides


def _param(at: At, group: str) -> Argument:
    """A stacked parameter; fp8 is read as such where the configuration says that the target knows it, else as bytes."""
    kind = at.spec.experts.stored(group)
    return Argument(group, "*fp8e4nv") if kind == "fp8" and at.config.native_fp8 else pointer(group, kind)


def depth_of_step(at: At, depth: int, most: int = 0) -> int:
    """Numbers summed in one step, `most` of them or as many as the configuration says: no more than share a scale."""
    coding = at.spec.experts.coding
    shared = coding.columns & -coding.columns if coding else 0
    if shared and shared < 16:
        raise CodegenError(f"codes {coding}: expected a scale for 16 numbers of a row, or a multiple of 16, or for all")
    return min(most or at.config.block_k, max(16, power_of_two(depth)), *((shared,) if shared else ()))


def gemm_consts(at: At, depth: int) -> dict[str, int | bool]:
    c = at.config
    block_k = depth_of_step(at, depth)
    return {
        "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": block_k, "GROUP_M": c.group_m,
        "EVEN_K": depth % block_k == 0,
    }  # fmt: skip


def permute(at: At, source: str = "x", into: str = "rows") -> Launch:
    """Rows of x (weighted where experts read them so), or of the gradient of y, in the order of experts."""
    s, o, e = at.sizes, at.operands, at.spec.experts
    of_x, on_input = source == "x", e.weight_on == "input"
    wide = s.H if of_x else s.O
    columns = min(256, power_of_two(wide))
    rows = max(1, 4096 // columns)
    strides = o.x_strides if of_x else (s.O, 1)
    consts = constants(
        H=wide, E=s.E, K=s.k, stride_x_t=strides[0], stride_x_h=strides[1], WEIGHTED=of_x and on_input,
        BLOCK_ROWS=rows, BLOCK_COLUMNS=columns,
    )  # fmt: skip
    arguments = (
        replace(pointer("x", o.x_dtype if of_x else at.spec.y_dtype), binding=source),
        *((pointer("weights", o.weights_dtype),) if on_input else ()),
        pointer("order", "i32"), pointer("offsets", "i32"), replace(pointer("rows", e.dtype), binding=into), *consts,
    )  # fmt: skip
    return Launch("permute", (ceil_div(at.rows, rows), ceil_div(wide, columns)), arguments, 4, 1)
