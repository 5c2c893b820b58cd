"""Find where something is chosen: numbers that come from data become integers or a mask."""

from __future__ import annotations

from collections.abc import Mapping

from moec.ir.graph import Graph, Instr
from moec.passes.rows.lift import FLOATS

_NOT_CHOICES = frozenset({"anchor", "anchor_range", "cast", "size", "assert", "effect"})


def choices_of(graph: Graph) -> tuple[Instr, ...]:
    """Top-k, sort, argmax, threshold, draw: every instruction that chooses, in order. Plain noise chooses nothing."""
    data = {name for name, kind in graph.inputs if kind.dtype in FLOATS or is_choice(kind.dtype)}
    found: list[Instr] = []
    for instr in graph.instrs:
        if data.isdisjoint(instr.uses):
            continue
        chosen = _becomes_integer(graph, instr, data)
        if instr.word != "random" or chosen:
            data.update(instr.results)
        if chosen:
            found.append(instr)
    return tuple(found)


def _becomes_integer(graph: Graph, instr: Instr, data: set[str]) -> bool:
    if not instr.results or instr.word in _NOT_CHOICES:
        return False
    given = any(graph.types[name].dtype in FLOATS and name in data for name in instr.uses)
    return given and any(kind.rank and is_choice(kind.dtype) for kind in instr.types)


def is_choice(dtype: str) -> bool:
    """Whether a value of this dtype is a choice: whole numbers or a mask, not floats nor complex numbers."""
    return dtype == "bool" or (dtype[:1] in ("i", "u") and dtype[1:].isdigit())


def dependence(graph: Graph, owner: Mapping[str, int]) -> dict[str, int]:
    """For each value, as bits, the numbers in `owner` of the values that it comes from, itself included."""
    bits: dict[str, int] = {}
    for instr in graph.instrs:
        mask = 0
        for name in instr.uses:
            mask |= bits.get(name, 0)
        for name in instr.results:
            bits[name] = mask | (1 << owner[name] if name in owner else 0)
    return bits
