"""Seat numbers: a pair's expert times the seats of one, plus its place, is its row in a flat table of seats.

%dest = where(lt(%place, C), add(mul(%ids, C), %place), E·C)   →   seat numbers; the dropped go to one row more
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moec.ir.formulas import size_of
from moec.ir.graph import Arg, Dim, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.capacity.choice import chosen
from moec.passes.rows.hot import Below, Chosen, Cond, Flag, Labels, Place, Running, broadcast, implied, settled
from moec.passes.rows.lift import First, Lift, Lifter
from moec.passes.rows.rows import Special


@dataclass(frozen=True)
class Scaled(Special):
    """The experts that pairs chose, times a number."""

    base: str
    axes: Labels
    by: Dim


@dataclass(frozen=True)
class SeatIds(Special):
    """expert·seats + place of each pair that meets `only`.

    rest  where the others are: a seat number, or None where that is not known (the last seat, where places are clamped)
    """

    base: str
    axes: Labels
    place: Place
    seats: Dim
    only: frozenset[Cond] = frozenset()
    rest: Dim | None = None


def number(lifter: Lifter, arg: Arg) -> Dim | None:
    """A whole number, or a size, that is given as it is or fills a tensor."""
    if isinstance(arg, Ref):
        made = lifter.instr(arg)
        if made is None or made.word != "full" or made.attr("value") is None:
            return None
        value = made.attr("value")
        return size_of(int(value) if isinstance(value, float) and value.is_integer() else value)
    if isinstance(arg, bool) or not isinstance(arg, int | str):
        return None
    return size_of(arg)


def scaled(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """ids · C; seat numbers · kept, which is seat 0 for the others."""
    for ids, by in (instr.args, instr.args[::-1]):
        if isinstance(held := lifter.lift(ids), SeatIds):
            return _masked(lifter, held, by, instr)
        factor = number(lifter, by)
        held = chosen(lifter, ids) if factor is not None else held
        if isinstance(held, Chosen) and factor is not None:
            return Scaled(held.base, held.axes, factor)
    return None


def _masked(lifter: Lifter, ids: SeatIds, by: Arg, instr: Instr) -> Lift:
    mask = lifter.lift(by)
    if isinstance(mask, Below) and not mask.negated:
        mask = Flag(mask.base, mask.axes, frozenset({mask.cond}), mask.source, True)
    if not isinstance(mask, Flag) or not mask.unit or mask.base != ids.base or mask.axes != ids.axes or ids.only:
        return NoMatch("seat numbers times something else than a mask of kept pairs", instr.results[0], 3)
    return replace(ids, only=mask.only, rest=size_of(0))


def seat(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """ids · C + place."""
    for left, right in (instr.args, instr.args[::-1]):
        ids, place = lifter.lift(left), lifter.lift(right)
        if not isinstance(ids, Scaled):
            continue
        if not isinstance(place, Running) or place.base != ids.base or "e" in "".join(place.axes):
            return NoMatch("experts' seats plus something else than the pair's place", instr.results[0], 3)
        axes = broadcast(ids.axes, place.axes)
        if axes is None or len(axes) != instr.types[0].rank:
            return NoMatch("experts' seats and places of different pairs", instr.results[0], 3)
        return SeatIds(ids.base, axes, place.place, ids.by, place.place.given)
    return None


def chosen_seat(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """where(kept, seat numbers, the row of the dropped); masked_fill of those that are not kept."""
    cond, value, other = instr.args if instr.word == "where" else (instr.args[1], instr.args[0], instr.args[2])
    ids = lifter.lift(value)
    if not isinstance(ids, SeatIds):
        return None
    mask, rest = lifter.lift(cond), number(lifter, other)
    kept = isinstance(mask, Below) and mask.negated == (instr.word == "masked_fill")
    if not isinstance(mask, Below) or not kept or mask.base != ids.base or mask.axes != ids.axes or rest is None:
        return NoMatch("seat numbers are exchanged by something else than a place's capacity", instr.results[0], 3)
    if ids.rest is not None or not all(implied(c, mask.place.given | {mask.cond}) for c in ids.only):
        return NoMatch("seat numbers are exchanged twice", instr.results[0], 3)
    return replace(ids, only=settled(ids.only | {replace(mask, negated=False).cond}), rest=rest)


BEFORE: Mapping[str, First] = {
    "mul": scaled,
    "add": seat,
    "where": chosen_seat,
    "masked_fill": chosen_seat,
}
"""Tried before the rules of masks."""
