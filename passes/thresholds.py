"""Experts chosen by a mask or a threshold: any number of them a token, each at most once.

for e: rows = where(g[:, e] > t); y[rows] += g[rows, e]·expert_e(x[rows])
    →   experts(x, g[T, E], where(g > t, arange(E), −1)): E slots a token, of which no kernel runs those with −1
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.graph import Arg, Instr, Ref, Type
from moec.match import NoMatch
from moec.passes.lift import FLOATS, Lift, Lifter, same
from moec.passes.pairs import Writer
from moec.passes.rows import Anchor, Column, Gates, OneHot

_COMPARISONS = frozenset({"gt", "ge", "lt", "le", "ne", "eq"})


@dataclass(frozen=True)
class Table:
    """Who chooses whom, [T, E]: the mask `value`, or where `value` compares so with a number."""

    value: str
    word: str = ""
    limit: float = 0.0

    @property
    def name(self) -> str:
        """The choice's name while it is matched."""
        return f"{self.value}#{self.word}{self.limit if self.word else ''}"


def column(lifter: Lifter, held: Gates, item: Anchor) -> Lift:
    """table[:, e]: numbers of the loop's expert, or the mask of its rows."""
    kind = lifter.graph.types[held.value]
    if kind.dtype in FLOATS:
        return Column(held.value, item.name)
    if kind.rank != 2 or kind.dtype != "bool":
        return NoMatch(f"a column of {kind} taken at the loop's expert", held.value)
    return _mask(lifter, Table(held.value), item.name)


def compared(lifter: Lifter, word: str, left: Arg, right: Arg) -> OneHot | None:
    """g[:, e] > t: the mask of the expert's rows."""
    held = lifter.lift(left)
    number = isinstance(right, (int, float)) and not isinstance(right, bool)
    if not isinstance(held, Column) or word not in _COMPARISONS or not number:
        return None
    if lifter.graph.types[held.value].rank != 2:
        return None
    assert isinstance(right, (int, float))
    return _mask(lifter, Table(held.value, word, float(right)), held.key)


def _mask(lifter: Lifter, table: Table, anchor: str) -> OneHot:
    lifter.tables[table.name] = table
    return OneHot(table.name, ("t",), anchor)


def table_choice(
    lifter: Lifter, root: Instr, choice: str, weight: str, by_expert: bool, experts: int
) -> tuple[tuple[Instr, ...], str, str] | NoMatch:
    """Instructions, w[T, E] and e[T, E] of a choice that is a table of `lifter.tables`."""
    table = lifter.tables[choice]
    assert isinstance(table, Table)
    kind = lifter.graph.types[table.value]
    if kind.shape[1] != experts or (weight and not by_expert):
        return NoMatch(f"choices are {kind} for {experts} experts, weighted by %{weight}", table.value)
    given = lifter.graph.types[weight] if weight else kind
    if given.rank != 2 or not all(same(a, b) for a, b in zip(given.shape, kind.shape, strict=True)):
        return NoMatch(f"gates are {given} for choices {kind}", weight)
    out = Writer(lifter.graph, root)
    mask = table.value
    if table.word:
        mask = out.emit(table.word, (Ref(table.value), table.limit), Type("bool", kind.shape))
    chosen = out.emit("experts_where", (Ref(mask),), Type("i64", kind.shape))
    return tuple(out.instrs), weight, chosen
