"""Rows of experts that are no MLPs: whatever a loop's body computes from its rows and its expert's tensors."""

from __future__ import annotations

from functools import lru_cache

from moec.ir.graph import Graph, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.rows.lift import Lift, Lifter
from moec.passes.rows.rows import Anchor, Body, Expert, Ids, Opaque, Rows, Space


def opaque_rows(lifter: Lifter, instr: Instr, which: int, miss: NoMatch) -> Lift:
    """A value of a loop's body that no rule knows: rows where its first axis is the rows', else part of a body."""
    space: Space | None = None
    choice, rows = "", None
    for name in instr.uses:
        held = _in_body(lifter, name)
        if isinstance(held, Rows | Body) and held.space.kind == "loop":
            if space is not None and space.same_rows != held.space.same_rows:
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


def _in_body(lifter: Lifter, name: str) -> Lift:
    """A value as part of a loop's body, although a rule took it for rows of a layer inside that body."""
    held = lifter.lift(Ref(name))
    made = lifter.graph.defs.get(name)
    if made is None or isinstance(held, Expert) or not _varies(lifter.graph, name):
        return held
    if isinstance(held, Rows | Body | Ids | Anchor) and (isinstance(held, Anchor) or held.space.kind == "loop"):
        return held
    key = f"{name}#body"
    if key not in lifter.memo:
        lifter.memo[key] = opaque_rows(lifter, made, made.results.index(name), NoMatch("not of a loop's body", name))
    return lifter.memo[key]


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
