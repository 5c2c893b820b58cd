"""Among the slots of a loop's rows, the one that chose the expert: where the rows are a token each, not a pair.

rows = (ids == e).any(-1); w[rows] and ids[rows] == e are [n, k]. The number of the slot that chose e is taken by a sum
of what is left of w, by an index at the places of the mask, or by a gather at its argmax: each time it is w[t, s].
The argmax and the gather may also be of all tokens, and be read at the loop's rows: what others have there is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moec.ir.graph import Arg, Instr, Ref
from moec.passes.rows.lift import FLOATS, First, Lift, Lifter, Rule, tried_first
from moec.passes.rows.rows import Anchor, Gate, Ids, Masked, OneHot, Rows, Slot, Space, Special, Token
from moec.passes.rows.token_axes import base_of, choice_axes, is_token, names_once


@dataclass(frozen=True)
class Mine(Special):
    """Whether slot s of a row's token chose the loop's expert, [n, k]; with `value`, w[t, s] there and 0 elsewhere."""

    space: Space
    choice: str
    value: str = ""


@dataclass(frozen=True)
class SlotOf(Special):
    """The slot of each token that chose the loop's expert, any where none did; with `value`, its w[t, s]."""

    choice: str
    anchor: str
    value: str = ""


def _vectors(lifter: Lifter, arg: Arg) -> Rows | None:
    """w[rows] or ids[rows], [n, k]: a number for each slot of the loop's rows."""
    held = lifter.lift(arg)
    known = isinstance(held, Rows) and held.space.kind == "loop" and isinstance(held.row, Token)
    return held if known and isinstance(held, Rows) and lifter.type(arg).rank == 2 and held.layout == "flat" else None


def _mine(lifter: Lifter, arg: Arg) -> Mine | None:
    held = lifter.lift(arg)
    return held if isinstance(held, Mine) else None


def _once(lifter: Lifter, mine: Mine) -> bool:
    """Whether each row has exactly one slot that chose its expert, rows being those of tokens that did."""
    choice = base_of(mine.choice)
    return set(mine.space.order) <= {"t"} and choice in lifter.graph.types and names_once(lifter.graph, choice)


def _compare(lifter: Lifter, instr: Instr) -> Lift | None:
    """ids[rows] == e."""
    for arg, item in (instr.args, instr.args[::-1]):
        rows, anchor = _vectors(lifter, arg), lifter.lift(item) if isinstance(item, Ref) else None
        if rows is None or not isinstance(anchor, Anchor) or anchor.name != rows.space.key:
            continue
        assert isinstance(rows.row, Token)
        choice = base_of(rows.choice)
        if rows.row.value != choice or (choice != rows.choice and not names_once(lifter.graph, choice)):
            continue
        if "s" in choice_axes(lifter.graph, choice):
            return Mine(rows.space, rows.choice)
    return None


def _same(lifter: Lifter, instr: Instr) -> Lift | None:
    """The mask as numbers."""
    return _mine(lifter, instr.args[0])


def _weighted(lifter: Lifter, instr: Instr) -> Lift | None:
    """w[rows]·mask and where(mask, w[rows], 0), of all tokens or of the loop's rows."""
    mask, value, *rest = instr.args
    if instr.word == "where" and not (rest and lifter.graph.is_zero(rest[0], ("expand", "reshape", "cast"))):
        return None
    orders = ((mask, value), (value, mask)) if instr.word == "mul" else ((mask, value),)
    for first, other in orders:
        held, numbers = lifter.lift(first), _vectors(lifter, other)
        if isinstance(held, Mine) and not held.value and numbers is not None and numbers.space == held.space:
            assert isinstance(numbers.row, Token)
            return replace(held, value=numbers.row.value)
        if instr.word == "where" and isinstance(held, OneHot) and held.anchor and isinstance(other, Ref):
            known = choice_axes(lifter.graph, held.choice) if held.choice in lifter.graph.types else ()
            if held.axes == known and "s" in known and lifter.type(other).shape == lifter.type(first).shape:
                return Masked(other.name, held.choice, held.anchor)
    return None


def _summed(lifter: Lifter, instr: Instr) -> Lift | None:
    """The sum over slots of what is left of w."""
    mine = _mine(lifter, instr.args[0])
    if mine is None or not mine.value or instr.attr("dims") != (1,) or instr.word != "reduce_sum":
        return None
    return Rows(mine.space, Slot(mine.value), "flat", mine.choice)


def _places(lifter: Lifter, instr: Instr) -> Lift | None:
    """nonzero(mask): for each row, in order, its own number and the slot."""
    mine = _mine(lifter, instr.args[0])
    if mine is None or mine.value or instr.word == "nonzero" or not _once(lifter, mine):
        return None
    return Ids(mine.space, "row", mine.choice)


def _picked(lifter: Lifter, instr: Instr) -> Lift | None:
    """w[rows][row, slot]: one number a row."""
    table, *ids = instr.args
    if instr.attr("dim") != 0 or len(ids) != 2:
        return None
    numbers, slot = _vectors(lifter, table), lifter.lift(ids[1])
    if numbers is None or not isinstance(slot, Ids) or slot.what != "slot" or slot.space != numbers.space:
        return None
    first = lifter.lift(ids[0])
    own = isinstance(first, Ids) and first.what == "row" and first.space == slot.space
    made = lifter.instr(ids[0])
    counted = made is not None and made.word == "arange" and lifter.type(ids[0]).shape == lifter.type(table).shape[:1]
    if not own and not counted:
        return None
    assert isinstance(numbers.row, Token)
    return Rows(numbers.space, Slot(numbers.row.value), "flat", slot.choice)


def _gathered(lifter: Lifter, instr: Instr) -> Lift | None:
    """w[rows].gather(1, slot[:, None])."""
    numbers, slot = _vectors(lifter, instr.args[0]), lifter.lift(instr.args[1])
    if instr.attr("dim") != 1 or lifter.type(instr.args[1]).shape[1:] != (1,) or numbers is None:
        return None
    if not isinstance(slot, Ids) or slot.what != "slot" or slot.space != numbers.space:
        return None
    assert isinstance(numbers.row, Token)
    return Rows(numbers.space, Slot(numbers.row.value), "flat", slot.choice)


def _largest(lifter: Lifter, instr: Instr) -> Lift | None:
    """argmax(mask): the slot."""
    mine = _mine(lifter, instr.args[0])
    if mine is None:
        return _slot_of(lifter, instr)
    if mine.value or instr.attr("dim") not in (1, -1) or not _once(lifter, mine):
        return None
    return Ids(mine.space, "slot", mine.choice)


def _slot_of(lifter: Lifter, instr: Instr) -> Lift | None:
    """argmax(ids == e), of all tokens."""
    held, last = lifter.lift(instr.args[0]), lifter.type(instr.args[0]).rank - 1
    if not isinstance(held, OneHot) or not held.anchor or held.choice not in lifter.graph.types:
        return None
    whole = held.axes == choice_axes(lifter.graph, held.choice) and held.axes[-1:] == ("s",)
    if not whole or instr.attr("dim") not in (last, -1) or not names_once(lifter.graph, held.choice):
        return None
    return SlotOf(held.choice, held.anchor)


def _viewed(lifter: Lifter, instr: Instr) -> Lift | None:
    """An axis of size 1 behind the slots of all tokens, or none."""
    held = lifter.lift(instr.args[0])
    if not isinstance(held, SlotOf):
        return None
    given, made = lifter.type(instr.args[0]).shape, instr.types[0].shape
    return held if made == (*given, 1) or (given[-1] == 1 and made == given[:-1]) else None


def _gathered_of_all(lifter: Lifter, instr: Instr) -> Lift | None:
    """w.gather(-1, slot[..., None])."""
    table, at = instr.args
    held, rank = lifter.lift(at), lifter.type(table).rank
    if (
        not isinstance(held, SlotOf)
        or held.value
        or not isinstance(table, Ref)
        or instr.attr("dim") not in (rank - 1, -1)
    ):
        return None
    alike = lifter.type(table).shape == lifter.type(Ref(held.choice)).shape and lifter.type(at).shape[-1:] == (1,)
    return replace(held, value=table.name) if alike and lifter.type(at).rank == rank else None


def _at_rows(lifter: Lifter, instr: Instr) -> Lift | None:
    """slot[rows] and w.gather(…)[rows], for the tokens of the loop's rows."""
    held, ids = lifter.lift(instr.args[0]), [lifter.lift(i) for i in instr.args[1:]]
    first = ids[0] if ids else None
    if not isinstance(held, SlotOf) or not isinstance(first, Ids) or first.space.kind != "loop":
        return None
    whole = is_token(lifter.graph, first.choice, tuple(i.what for i in ids if isinstance(i, Ids)))
    same = all(isinstance(i, Ids) and (i.space, i.choice) == (first.space, first.choice) for i in ids)
    if not whole or not same or (first.space.key, first.choice) != (held.anchor, held.choice) or instr.attr("dim") != 0:
        return None
    if held.value:
        return Rows(first.space, Slot(held.value), first.layout, held.choice)
    return Ids(first.space, "slot", held.choice)


def _column(lifter: Lifter, instr: Instr) -> Lift | None:
    """g[rows][:, e]: the gate of the loop's expert for each of its rows."""
    table, item = instr.args
    made, anchor = lifter.instr(table), lifter.lift(item)
    if made is None or made.word != "permute" or made.attr("dims") != (1, 0) or not isinstance(anchor, Anchor):
        return None
    rows = _vectors(lifter, made.args[0])
    if rows is None or rows.space.key != anchor.name or lifter.type(made.args[0]).dtype not in FLOATS:
        return None
    assert isinstance(rows.row, Token)
    return replace(rows, row=Gate(rows.row.value))


def _slot_place(lifter: Lifter, instr: Instr, which: int) -> Lift | None:
    found = _places(lifter, instr)
    return replace(found, what="slot") if isinstance(found, Ids) and which == 1 else found


_FIRST: Mapping[str, First] = {
    "eq": lambda lifter, instr, which: _compare(lifter, instr),
    "cast": lambda lifter, instr, which: _same(lifter, instr),
    "same": lambda lifter, instr, which: _same(lifter, instr),
    "where": lambda lifter, instr, which: _weighted(lifter, instr),
    "mul": lambda lifter, instr, which: _weighted(lifter, instr),
    "reduce_sum": lambda lifter, instr, which: _summed(lifter, instr),
    "where_indices": _slot_place,
    "index": lambda lifter, instr, which: _at_rows(lifter, instr) or _picked(lifter, instr),
    "reshape": lambda lifter, instr, which: _viewed(lifter, instr),
    "gather": lambda lifter, instr, which: _gathered_of_all(lifter, instr) or _gathered(lifter, instr),
    "take": lambda lifter, instr, which: _column(lifter, instr),
    "max": lambda lifter, instr, which: _largest(lifter, instr) if which == 1 else None,
    "argmax": lambda lifter, instr, which: _largest(lifter, instr),
}


def with_slots(rules: Mapping[str, Rule]) -> Mapping[str, Rule]:
    """A table of row rules that knows the slots of a loop's rows."""
    return tried_first(rules, _FIRST)
