"""Maps [E, T] of who goes where: the places where one is true are pairs in expert order, and tables are read there."""

from __future__ import annotations

from moec.ir.graph import Arg, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.rows.lift import Lift, Lifter
from moec.passes.rows.rows import Gate, Gates, Ids, OneHot, Rows, Space


def pairs_of(mask: OneHot, where: Arg, which: int) -> Ids | None:
    """where(map[E, T]): the experts, and the tokens, of all pairs; an expert's tokens ascend."""
    if mask.anchor or mask.axes != ("e", "t") or not isinstance(where, Ref):
        return None
    return Ids(Space("sorted", 0, where.name), ("expert", "token")[which], mask.choice)


def at_pairs(lifter: Lifter, instr: Instr, table: Ref, ids: list[Ids]) -> Lift | None:
    """g[e, t] and g[t, e], a number a pair; of tokens' places repeated for every expert: the token."""
    first, what = ids[0], tuple(i.what for i in ids)
    if first.space.kind != "sorted" or sorted(what) != ["expert", "token"] or lifter.type(table).rank != 2:
        return None
    if what == ("token", "expert"):
        return Rows(first.space, Gate(table.name), first.layout, first.choice)
    if _every_place(lifter, table):
        return Ids(first.space, "token", first.choice)
    held = lifter.lift(table)
    if isinstance(held, Gates):
        return Rows(first.space, Gate(held.value), first.layout, first.choice)
    return held if isinstance(held, NoMatch) else NoMatch("pairs read something else than gates", instr.results[0])


def _every_place(lifter: Lifter, table: Ref) -> bool:
    """Whether a table [E, T] is arange(T) for every expert."""
    made = lifter.instr(table)
    while made is not None and made.word in ("expand", "repeat", "reshape", "same"):
        source, to = lifter.type(made.args[0]), made.types[0]
        if made.word != "reshape" and source.shape[-1] != to.shape[-1]:
            return False
        if made.word == "reshape" and tuple(d for d in to.shape if d != 1) != tuple(d for d in source.shape if d != 1):
            return False
        if to.shape[-1] != lifter.type(table).shape[-1]:
            return False
        made = lifter.instr(made.args[0])
    return made is not None and made.word == "arange" and made.types[0].shape[0] == lifter.type(table).shape[1]
