"""Weights of a loop's rows, a number a row, that are filled in slot by slot among these rows.

m = (ids == e).any(-1); g = zeros(n); for k: m_k = ids[m, k] == e; g[m_k] = w[m, k][m_k]   →   g = w[t, s] of each row

The rows are tokens that chose the expert once: one slot of each fills its weight in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moec.ir.graph import Arg, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.rows.lift import FLOATS, First, Lift, Lifter, Rule, tried_first
from moec.passes.rows.rows import Anchor, Rows, Slot, Space, Special, Token
from moec.passes.rows.token_axes import base_of, column_of, names_once, seen


@dataclass(frozen=True)
class InSlot(Special):
    """Which of the loop's rows slot `slot` of their token chose the expert for, [n]; `places`: where it did."""

    space: Space
    choice: str
    slot: int
    places: bool = False


@dataclass(frozen=True)
class OfSlot(Special):
    """w[t, slot] of those rows."""

    rows: InSlot
    value: str


@dataclass(frozen=True)
class FilledRows(Special):
    """Zeros [n] but at the rows of these slots: there w[t, s]."""

    space: Space
    choice: str
    value: str
    slots: frozenset[int]


def _column(lifter: Lifter, arg: Arg) -> tuple[Rows, str, int] | None:
    """A loop's rows of one column of a tensor […, k]: the rows, the tensor, which column."""
    held = lifter.lift(arg)
    if not isinstance(held, Rows) or held.space.kind != "loop" or held.space.order != "t" or held.layout != "flat":
        return None
    if not isinstance(held.row, Token) or lifter.type(arg).rank != 1:
        return None
    found = column_of(lifter.graph, held.row.value)
    return None if found is None else (held, *found)


def _chosen(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """ids[m, k] == e."""
    for arg, item in (instr.args, instr.args[::-1]):
        anchor = lifter.lift(item) if isinstance(item, Ref) else None
        if not isinstance(anchor, Anchor):
            continue
        found = _column(lifter, arg)
        if found is None or found[0].space.key != anchor.name:
            continue
        rows, source, slot = found
        whole = rows.choice in lifter.graph.types and seen(lifter.graph, source) == seen(lifter.graph, rows.choice)
        return InSlot(rows.space, rows.choice, slot) if whole else None
    return None


def _places(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    held = lifter.lift(instr.args[0])
    return replace(held, places=True) if isinstance(held, InSlot) and instr.word != "nonzero" else None


def _index(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """w[m, k][m_k]."""
    table, *ids = instr.args
    at = lifter.lift(ids[0]) if len(ids) == 1 and instr.attr("dim") == 0 else None
    if not isinstance(at, InSlot):
        return None
    found = _column(lifter, table)
    if not at.places or found is None or lifter.type(table).dtype not in FLOATS:
        return NoMatch("rows of one slot are taken of something else than weights of the loop's rows", instr.results[0])
    rows, source, slot = found
    if (rows.space, rows.choice, slot) != (at.space, at.choice, at.slot):
        return NoMatch("weights of another slot, or of other rows", instr.results[0])
    return OfSlot(at, source)


def _fill(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """g[m_k] = w[m, k][m_k]; with all slots, the weight of each row."""
    base, source, *ids = instr.args
    at = lifter.lift(ids[0]) if len(ids) == 1 and instr.attr("dim") == 0 else None
    if not isinstance(at, InSlot):
        return None
    given, before = lifter.lift(source), lifter.lift(base)
    if not isinstance(given, OfSlot) or given.rows != at or not names_once(lifter.graph, base_of(at.choice)):
        return NoMatch("rows of one slot are filled with something else than their weights", instr.results[0])
    new = FilledRows(at.space, at.choice, given.value, frozenset((at.slot,)))
    if isinstance(before, FilledRows):
        if replace(before, slots=new.slots) != new or before.slots & new.slots:
            return NoMatch("weights are filled from different tensors", instr.results[0])
        new = replace(new, slots=before.slots | new.slots)
    elif not lifter.graph.is_zero(base, ("same", "cast")):
        return NoMatch("weights are filled into something else than zeros", instr.results[0])
    if lifter.graph.types[new.choice].shape[-1] != len(new.slots):
        return new
    return Rows(new.space, Slot(new.value), "flat", new.choice)


_FIRST: Mapping[str, First] = {
    "eq": _chosen,
    "where_indices": _places,
    "index": _index,
    "index_put": _fill,
}


def with_row_weights(rules: Mapping[str, Rule]) -> Mapping[str, Rule]:
    """A table of row rules that knows weights of rows that are filled in slot by slot."""
    return tried_first(rules, _FIRST)
