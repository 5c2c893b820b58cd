"""A loop whose experts take the first C of their rows alone: who comes later is dropped.

rows = where(ids == e)[:C]   →   the rows of the choice where(fewer than C pairs before it chose the same, ids, −1)

"Before" is in the order of the loop's own rows; rows of another number, and rows that were not cut, do not meet these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from moec.ir.graph import Graph, Instr, Ref, Type
from moec.ir.match import NoMatch
from moec.passes.rows.lift import Lift, Lifter
from moec.passes.rows.pairs import Writer
from moec.passes.rows.rows import Ids, Rows
from moec.passes.rows.token_axes import base_of, names_once, slots_of

_ORDERS = {"t": False, "ts": False, "st": True}
"""The orders of rows that a count along the choice follows; whether slots come first."""


@dataclass(frozen=True)
class First:
    """The pairs of `choice` that are among the first `most` of their expert; `by_slot`: slots count before tokens."""

    choice: str
    most: int | str
    by_slot: bool

    @property
    def name(self) -> str:
        """What the choice is known by while it is matched: a part of `choice`."""
        return f"{self.choice}#first {self.most} by {'slot' if self.by_slot else 'token'}"


def rule_first(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """rows[:C] of a loop's rows, or of what is computed of them."""
    return firsts(lifter, lifter.lift(instr.args[0]), instr)


def firsts(lifter: Lifter, rows: Lift, instr: Instr) -> Lift:
    """The first of these rows, as many as `instr` leaves."""
    most, name = instr.attr("most"), instr.results[0]
    if isinstance(rows, NoMatch):
        return rows
    if not isinstance(rows, Rows | Ids) or rows.space.kind != "loop" or rows.layout != "flat":
        return NoMatch("the first of something else than a loop's rows", name)
    if rows.space.most or not rows.choice or not isinstance(most, int | str):
        return NoMatch("the first rows of some that were cut before", name, 3)
    if rows.space.order not in _ORDERS:
        return NoMatch(f"the first rows in the order {rows.space.order}, expected the order of a mask", name, 3)
    if not _ordered(lifter, rows):
        return NoMatch("the first rows of tokens that may choose an expert twice", name, 3)
    found = First(rows.choice, most, _ORDERS[rows.space.order])
    lifter.firsts[found.name] = found
    return replace(rows, choice=found.name, space=replace(rows.space, most=str(most)))


def _ordered(lifter: Lifter, rows: Rows | Ids) -> bool:
    """Whether each of the rows is one pair of its choice."""
    choice = base_of(rows.choice)
    return "s" in rows.space.order or choice not in lifter.graph.types or names_once(lifter.graph, choice)


def first_choice(
    graph: Graph, root: Instr, first: First, routed: tuple[tuple[Instr, ...], str, str], experts: int
) -> tuple[tuple[Instr, ...], str, str]:
    """Instructions, weights and e[T, k] of a routing without what is not among the first of its expert: −1 there."""
    prelude, weights, choice = routed
    made = {name: kind for each in prelude for name, kind in zip(each.results, each.types, strict=True)}
    out = Writer(graph, root, list(prelude), made)
    slots = slots_of(graph, choice)
    choice = out.column(choice)
    kind = out.type(choice)
    if slots is None:
        slots = kind.shape[-1] if kind.rank > 1 else sympy.S.One
    pairs = out.reshape(choice, (sympy.Mul(*kind.shape) / slots, slots))
    attrs = {"experts": experts, "most": first.most, "by_slot": first.by_slot}
    chosen = out.emit("first_of_each", (Ref(pairs),), Type(kind.dtype, out.type(pairs).shape), **attrs)
    return tuple(out.instrs), weights, chosen
