"""Experts whose matrices are kept as codes: cast, and multiplied by a scale for each row, block or matrix.

linear(x, mul(cast(q[e]), s[e]))   →   dot(x, q[e] as codes, s[e])        (`moec.ir.coding`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy

from moec.ir.coding import Coding
from moec.ir.graph import Dim, Graph, Instr
from moec.ir.match import NoMatch
from moec.passes.rows.lift import FLOATS, Lift, Lifter
from moec.passes.rows.rows import Expert

_ELEMENTS = {"i8": "int8", "torch.float8_e4m3fn": "fp8", "bf16": "bf16"}


def cast_expert(instr: Instr, inner: Expert) -> Lift:
    """An expert's tensor in another dtype."""
    to = instr.types[0].dtype
    if to not in FLOATS:
        return NoMatch(f"an expert's parameter is cast to {to}", instr.results[0])
    return replace(inner, to=to)


def repeated(instr: Instr, inner: Expert) -> Lift:
    """Scales of blocks, each as often as its block has rows or columns."""
    dim, n = instr.attr("dim"), instr.attr("repeats")
    if not isinstance(dim, int) or not isinstance(n, int):
        return NoMatch("an expert's numbers are repeated by a tensor", instr.results[0])
    return replace(inner, spread=(*inner.spread, (dim, n)))


def scaled(lifter: Lifter, instr: Instr) -> Expert | None:
    """A cast matrix of an expert times its scales."""
    if instr.word != "mul" or len(instr.args) != 2:
        return None
    for codes, scale in (instr.args, instr.args[::-1]):
        matrix, by = lifter.lift(codes), lifter.lift(scale)
        if not isinstance(matrix, Expert) or not isinstance(by, Expert) or by.scale or matrix.scale:
            continue
        shape, given = lifter.type(codes).shape, lifter.type(scale).shape
        alike = (matrix.stacked, matrix.at) == (by.stacked, by.at) and matrix.order == (0, 1)
        if not alike or not matrix.to or matrix.spread or instr.types[0].shape != shape:
            continue
        blocks = _blocks(shape, (*(sympy.S.One,) * (2 - len(given)), *given), dict(by.spread), 2 - len(given))
        if blocks is not None and by.order in ((), (0,), (0, 1)):
            return replace(matrix, scale=by.values, blocks=blocks)
    return None


def _blocks(shape: Sequence[Dim], given: Sequence[Dim], spread: dict[int, int], lead: int) -> tuple[int, ...] | None:
    """How many numbers of each axis share a scale; 0 for all of them."""
    found: list[int] = []
    for axis, (size, have) in enumerate(zip(shape, given, strict=True)):
        if have not in (1, size):
            return None
        found.append(spread.get(axis - lead, 1) if have == size and (axis - lead in spread or size != 1) else 0)
    return tuple(found)


def coding_of(graph: Graph, matrices: Sequence[tuple[Expert, int]]) -> tuple[str, str] | NoMatch:
    """(codes, dtype of products) of an expert's matrices, each with the axis that products contract; ('', …): none.

    `codes` is `cast` where all are in a dtype that no kernel widens by itself, so that they have to be cast before.
    """
    kinds = {graph.types[m.values[0]].dtype for m, _ in matrices}
    to = {m.to or graph.types[m.values[0]].dtype for m, _ in matrices}
    if len(kinds) != 1 or len(to) != 1:
        return NoMatch(f"experts' matrices are {', '.join(sorted(kinds))}, used as {', '.join(sorted(to))}", depth=6)
    kind, used = kinds.pop(), to.pop()
    if not any(m.to for m, _ in matrices):
        return "", kind
    if kind not in _ELEMENTS or (kind == "bf16" and (used != "f32" or any(m.scale for m, _ in matrices))):
        many = any(m.scale for m, _ in matrices)
        return NoMatch(f"scaled matrices are kept in {kind}, expected int8 or fp8", depth=6) if many else ("cast", used)
    # Blocks are told of [outputs, inputs]; the axis that is contracted holds the inputs.
    blocks = {(m.blocks if axis == 1 else m.blocks[::-1]) for m, axis in matrices}
    if kind == "bf16":
        return "bf16", used
    if len(blocks) != 1 or blocks == {()}:
        return NoMatch(
            f"matrices in {kind} have scales for blocks {sorted(blocks)}, expected one kind for all", depth=6
        )
    rows, columns = blocks.pop()
    return str(Coding(_ELEMENTS[kind], rows, columns)), used


def scale_shape(graph: Graph, matrix: Expert) -> tuple[Dim, ...]:
    """The shape of one expert's scales, in the order of its matrix."""
    shape = graph.types[matrix.values[0]].shape[1 if matrix.stacked else 0 :]
    return tuple(
        sympy.ceiling(size / block) if block else sympy.S.One for size, block in zip(shape, matrix.blocks, strict=True)
    )
