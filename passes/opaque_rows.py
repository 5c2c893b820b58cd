"""Rows of experts that are no MLPs: whatever a loop's body computes from its rows and its expert's tensors."""

from __future__ import annotations

from functools import lru_cache

from moec.graph import Graph, Instr, Ref
from moec.match import NoMatch
from moec.passes.lift import Lift, Lifter
from moec.passes.rows import Body, Expert, Opaque, Rows, Space


def opaque_rows(lifter: Lifter, instr: Instr, which: int, miss: NoMatch) -> Lift:
    """A value of a loop's body that no rule knows: rows again where its first axis is the rows', else part of a body."""
    space: Space | None = None
    choice, rows = "", None
    for name in instr.uses:
        held = lifter.lift(Ref(name))
        if isinstance(held, Rows | Body) and held.space.kind == "loop":
            if space is not None and (space.key, space.order) != (held.space.key, held.space.order):
                return miss
            space, choice = held.space, held.choice or choice
            rows = held.rows if isinstance(held, Body) else lifter.type(Ref(name)).shape[0]
        elif not isinstance(held, Expert) and _varies(lifter.graph, name):
            return miss
    if space is None or rows is None:
        return miss
    kind = instr.types[which]
    if kind.rank >= 1 and kind.shape[0] == rows and kind.dtype != "bool":
        return Rows(space, Opaque(instr.results[which]), choice=choice)
    return Body(space, rows, choice)


def _varies(graph: Graph, name: str) -> bool:
    return name in varying(graph)


@lru_cache(maxsize=8)
def varying(graph: Graph) -> frozenset[str]:
    """The values that may differ from one iteration of a rolled loop to the next."""
    found: set[str] = set()
    for instr in graph.instrs:
        if instr.word in ("anchor", "anchor_range", "carry", "carry_int") or not found.isdisjoint(instr.uses):
            found.update(instr.results)
    return frozenset(found)
