"""Rows of a loop that are cut again by the mask of one slot, and weights that are filled in slot by slot.

m = (ids == e).any(-1); r = f(x[m]); for k: m_k = ids[:, k] == e; y[m_k] += w[m_k, k, None] · r[m_k[m]]
    →   for k: y[m_k] += w[m_k, k, None] · f(x[m_k])
g = zeros(T); for k: g[m_k] = w[m_k, k]   →   g = (w · (ids == e)).sum(-1)

A row depends on its token alone, so those of m that m_k leaves are those of m_k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moec.ir.graph import Graph, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.rows.lift import First, Lift, Lifter, Rule, tried_first
from moec.passes.rows.rows import (
    Apply,
    Cast,
    Dot,
    Expert,
    Ids,
    Masked,
    Number,
    OneHot,
    Row,
    Rows,
    Slice,
    Slot,
    Special,
    Token,
)
from moec.passes.rows.token_axes import column_of, names_once, seen, token_axes


@dataclass(frozen=True)
class Left(Special):
    """Which of the loop's rows `of` the mask `mask` leaves; `places`: where it does."""

    of: Ids
    mask: OneHot
    places: bool = False


@dataclass(frozen=True)
class Filled(Special):
    """Zeros [T] but where a slot of `choice` chose the loop's expert: there w[t, s], of the slots so far."""

    value: str
    choice: str
    anchor: str
    slots: frozenset[int]


def within(graph: Graph, inner: OneHot, outer: str) -> bool:
    """Whether who has an expert by one mask has it by any slot of the choice `outer`: its slot is one of those."""
    if inner.choice == outer:
        return True
    column = column_of(graph, inner.choice) if inner.choice in graph.types else None
    return column is not None and seen(graph, column[0]) == seen(graph, outer)


def _index(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """mask_k[mask], and rows[mask_k[mask]]."""
    table, *ids = instr.args
    if len(ids) != 1 or instr.attr("dim") != 0 or not isinstance(table, Ref):
        return None
    at = lifter.lift(ids[0])
    if isinstance(at, Left):
        return _cut(lifter, instr, at)
    if not isinstance(at, Ids) or at.what != "token" or at.space.kind != "loop" or lifter.type(table).dtype != "bool":
        return None
    mask = lifter.lift(table)
    if not isinstance(mask, OneHot) or mask.anchor != at.space.key or at.space.order != "t":
        return None
    graph = lifter.graph
    flat = mask.axes == ("t",) and mask.choice in graph.types and token_axes(graph, mask.choice) == ("t",)
    return Left(at, mask) if flat and at.choice in graph.types and within(graph, mask, at.choice) else None


def _cut(lifter: Lifter, instr: Instr, at: Left) -> Lift | None:
    rows = lifter.lift(instr.args[0])
    if not at.places or not isinstance(rows, Rows) or rows.layout != "flat":
        return None
    if (rows.space, rows.choice) != (at.of.space, at.of.choice):
        return NoMatch("rows are cut by a mask of others", instr.results[0])
    if not _of_token(rows.row):
        return NoMatch("rows that are cut by the mask of a slot are weighted by all of them", instr.results[0])
    return replace(rows, choice=at.mask.choice)


def _of_token(row: Row) -> bool:
    """Whether a row is a function of its token and its expert, not of its slot."""
    match row:
        case Token() | Expert() | Number():
            return True
        case Dot(inner) | Slice(inner) | Cast(inner):
            return _of_token(inner)
        case Apply(_, args):
            return all(map(_of_token, args))
        case _:
            return False


def _places(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    left = lifter.lift(instr.args[0])
    return replace(left, places=True) if isinstance(left, Left) and instr.word != "nonzero" else None


def _and(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """mask & mask_k is mask_k."""
    a, b = (lifter.lift(arg) for arg in instr.args)
    for inner, outer in ((a, b), (b, a)):
        if not isinstance(inner, OneHot) or not isinstance(outer, OneHot) or not inner.anchor:
            continue
        same = inner.anchor == outer.anchor and inner.axes == outer.axes == ("t",)
        if same and outer.choice in lifter.graph.types and within(lifter.graph, inner, outer.choice):
            return inner
    return None


def _fill(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """g[mask_k] = w[mask_k, k]."""
    _, source, *ids = instr.args
    if instr.attr("dim") != 0 or len(ids) != 1 or instr.types[0].rank != 1:
        return None
    rows, at = lifter.lift(source), lifter.lift(ids[0])
    if not isinstance(rows, Rows) or not isinstance(at, Ids) or not isinstance(rows.row, Slot) or at.what != "token":
        return None
    if (
        (rows.space, rows.choice) != (at.space, at.choice)
        or at.space.kind != "loop"
        or at.choice not in lifter.graph.types
    ):
        return None
    weight, chosen = (column_of(lifter.graph, name) for name in (rows.row.value, at.choice))
    if weight is None or chosen is None or weight[1] != chosen[1]:
        return None
    return _filled(lifter, instr, Filled(weight[0], chosen[0], at.space.key, frozenset((chosen[1],))))


def _filled(lifter: Lifter, instr: Instr, new: Filled) -> Lift | None:
    """The weights so far; with all slots they are the masked weights, summed."""
    graph, base = lifter.graph, instr.args[0]
    if not instr.attr("accumulate") and not names_once(graph, new.choice):
        return NoMatch("a token may choose an expert twice, and the last slot's weight stays", instr.results[0])
    before = lifter.lift(base)
    if isinstance(before, Filled):
        if replace(before, slots=new.slots) != new or before.slots & new.slots:
            return NoMatch("weights are filled from different tensors", instr.results[0])
        new = replace(new, slots=before.slots | new.slots)
    elif not graph.is_zero(base, ("carry", "same", "reshape")):
        return None
    whole = graph.types[new.choice].shape[-1] == len(new.slots)
    return Masked(new.value, new.choice, new.anchor, True) if whole else new


_FIRST: Mapping[str, First] = {
    "index": _index,
    "where_indices": _places,
    "bitwise_and": _and,
    "logical_and": _and,
    "index_put": _fill,
}


def with_cuts(rules: Mapping[str, Rule]) -> Mapping[str, Rule]:
    """A table of row rules that knows rows cut by slots."""
    return tried_first(rules, _FIRST)
