"""Which weights tensor descriptors (TMA) can read, and the Triton text that makes and reads them.

A descriptor reads blocks whose last axis is contiguous and whose other strides are multiples of 16 bytes; what lies
outside the extents reads as zero. Each program makes its own in scratch memory, which Triton's allocator gives: see
`moec.runtime.triton.run`. Letters: H hidden, F expert width, E experts; BLOCK_N columns and BLOCK_K depth of a tile.
"""

from __future__ import annotations

from moec.codegen.plan import Sizes
from moec.codegen.triton_call import power_of_two
from moec.codegen.triton_config import GpuConfig
from moec.codegen.triton_operands import Operands
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec

_ALIGNED = 16  # bytes


def undescribable(spec: KernelSpec, sizes: Sizes, config: GpuConfig, operands: Operands) -> str | None:
    """Why the weights of a call cannot be read by descriptors; None where they can."""
    e = spec.experts
    if not e.stacked:
        return "each expert has a tensor of its own"
    if e.coding:
        return "they are kept as codes"
    for name, depth in (("H", sizes.H), ("F", sizes.F)):
        step = min(config.block_k, max(16, power_of_two(depth)))
        if depth % step:
            return f"{name}={depth} is no multiple of block_k={step}"
    item = DTYPES[e.dtype].itemsize
    for group in (g for g in e.param_groups if g in ("a", "b", "ab", "out")):
        expert, row, column = operands.strides(group)
        inner, outer = (column, row) if e.layout(group) == "nk" else (row, column)
        if inner != 1 or outer * item % _ALIGNED or expert * item % _ALIGNED:
            return f"the strides of {group!r} are {(expert, row, column)}: expected 1 and multiples of {_ALIGNED} bytes"
    if e.gate == "concat" and sizes.F * item % _ALIGNED:
        return f"half of 'ab' begins at F={sizes.F}: expected a multiple of {_ALIGNED} bytes"
    return None


def make(s: ExpertsSpec, group: str) -> str:
    """The text that makes the descriptor of all experts' matrices; the halves of a concatenated one are an axis."""
    rows = "O" if group == "out" else "2 * F" if s.gate == "interleaved" else "F"
    depth = "F" if group == "out" else "H"
    stride_n, stride_k = f"stride_{group}_n", f"stride_{group}_k"
    halves = group == "ab" and s.gate == "concat"
    nk = s.layout(group) == "nk"
    inner_n, inner_k = ("1" if not nk else stride_n), ("1" if nk else stride_k)
    across = [(rows, inner_n, columns(s, group))]
    if halves:
        across.insert(0, ("2", f"F * {stride_n}", "2"))
    along = [(depth, inner_k, "BLOCK_K")]
    axes = [("E", f"stride_{group}_e", "1"), *(across + along if nk else along + across)]
    shape, strides, block = (", ".join(part) for part in zip(*axes, strict=True))
    indent = " " * 8
    lines = (f"{indent}    {group}, [{shape}],", f"{indent}    [{strides}],", f"{indent}    [{block}],", f"{indent})")
    return "\n".join(("tl.make_tensor_descriptor(", *lines))


def read(s: ExpertsSpec, group: str) -> str:
    """The text that reads a block [BLOCK_K, columns] of expert e at depth k0 and this tile's column."""
    halves = group == "ab" and s.gate == "concat"
    own = columns(s, group)
    across = ["0", f"column * ({own})"] if halves else [f"column * ({own})"]
    nk = s.layout(group) == "nk"
    places = ["e", *across, "k0"] if nk else ["e", "k0", *across]
    block = f"{group}.load([{', '.join(places)}])"
    whole = f"2 * ({own})" if halves else own
    return f"{block}.reshape({whole}, BLOCK_K).T" if nk else f"{block}.reshape(BLOCK_K, {whole})"


def columns(s: ExpertsSpec, group: str) -> str:
    """Columns of the product that one row axis of a block has."""
    half = group in ("a", "b") or (group == "ab" and s.gate == "concat")
    return "BLOCK_N // 2" if half else "BLOCK_N"
