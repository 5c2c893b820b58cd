"""The rules of comparisons and of choices between two values, over labelled axes."""

from __future__ import annotations

from dataclasses import replace

from moec.ir.formulas import size_of
from moec.ir.graph import Arg, Dim, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.capacity import products
from moec.passes.capacity.choice import chosen
from moec.passes.capacity.seat_ids import Scaled, SeatIds
from moec.passes.rows.hot import (
    Below,
    Chosen,
    Cold,
    Flag,
    Hot,
    Running,
    Seats,
    Source,
    Spot,
    Sunk,
    Totals,
    letters_of,
    sinks,
    whose,
)
from moec.passes.rows.lift import Lift, Lifter

Labelled = Chosen | Hot | Flag | Running | Below | Totals | Spot | Seats | Scaled | SeatIds


def sizes_of(lifter: Lifter, arg: Arg, value: Labelled) -> dict[str, Dim]:
    """The size of each letter in the labels of a value's axes."""
    base = value.pairs.base if isinstance(value, Totals) else "" if isinstance(value, Seats) else value.base
    shape = lifter.graph.types[whose(base)].shape if base else ()
    sizes = dict(zip(letters_of(len(shape)), shape, strict=True))
    if isinstance(value, Seats):
        sizes |= dict(value.sizes)
    singles = zip(value.axes, lifter.type(arg).shape, strict=True)
    return sizes | {label: dim for label, dim in singles if len(label) == 1 and label != "1"}


def viewed(lifter: Lifter, instr: Instr) -> Lift:
    """What is viewed: a labelled value, or plain numbers of experts."""
    inner = lifter.lift(instr.args[0])
    return chosen(lifter, instr.args[0]) if isinstance(inner, NoMatch) else inner


def running(value: Lift) -> Lift:
    """A mask that is the pair's place at the pair, as a place; anything else as it is."""
    if not isinstance(value, Hot) or value.place is None or value.factors or value.at >= 0:
        return value
    place = replace(value.place, given=value.only | value.place.given)
    return Running(value.base, value.axes, place, Source("", value.axes))


def rule_compare(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """place < capacity, in each direction; weights > 0; ids == arange."""
    word, name = instr.word, instr.results[0]
    left, right = instr.args
    if word in ("eq", "ne") and not isinstance(right, Ref):
        return _column(lifter, instr, left, right)
    if word in ("eq", "ne"):
        return _equals(lifter, instr, left, right) if word == "eq" else NoMatch("places that differ", name)
    if isinstance(right, Ref) and not isinstance(left, Ref):
        left, right, word = right, left, _FLIPPED[word]
    inner = lifter.lift(left)
    if isinstance(inner, Seats) and right in (0, 0.0) and word in ("ne", "gt"):
        if word == "gt" and not inner.unit and not products.nonnegative(lifter.graph, inner):
            return NoMatch("tokens are sent where their weight is > 0, and weights may be negative", name, 3)
        return replace(inner, mask=True)
    if isinstance(inner, Hot) and inner.unit and right in (0, 0.0) and word == "gt":
        return inner
    inner = running(inner)
    if not isinstance(inner, Running):
        return inner if isinstance(inner, NoMatch) else NoMatch(f"`{word}` of {type(inner).__name__}", name)
    if isinstance(right, Ref) or right is None or isinstance(right, tuple) or word in ("eq", "ne"):
        return NoMatch("a place is compared with something else than the capacity", name)
    limit = size_of(right)
    bound = limit - inner.place.offset + (1 if word in ("le", "gt") else 0)
    beyond = word in ("ge", "gt")
    return Below(inner.base, inner.axes, inner.place, bound, Source(name, inner.axes), beyond, beyond)


_FLIPPED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}


def _column(lifter: Lifter, instr: Instr, left: Arg, right: Arg) -> Lift:
    """ids == 3: the column of expert 3; mask == 0: where a mask is not; seats != 0: where they are taken."""
    name, inner = instr.results[0], lifter.lift(left)
    if isinstance(inner, Seats) and right in (0, 0.0) and instr.word == "ne":
        return replace(inner, mask=True)
    if isinstance(inner, Hot) and inner.unit and right in (0, 0.0):
        return Cold(inner) if instr.word == "eq" else inner
    found = chosen(lifter, left)
    if isinstance(found, NoMatch) or not isinstance(right, int) or instr.word != "eq":
        return found if isinstance(found, NoMatch) else NoMatch("experts other than one", name)
    return Hot(found.base, found.axes, at=right)


def _equals(lifter: Lifter, instr: Instr, left: Arg, right: Arg) -> Lift:
    """ids[…, 1] == arange(n): one_hot."""
    name = instr.results[0]
    for counted, ids in ((left, right), (right, left)):
        length = counting(lifter, counted)
        if not length:
            continue
        inner = viewed(lifter, Instr(("",), "same", (ids,), (lifter.type(ids),)))
        if not isinstance(inner, Chosen | Running) or not inner.axes or inner.axes[-1] != "1":
            return (
                inner if isinstance(inner, NoMatch) else NoMatch("counted numbers compared with something else", name)
            )
        size = lifter.graph.types[length].shape[0]
        if isinstance(inner, Chosen):
            return Hot(inner.base, (*inner.axes[:-1], "e"))
        return products.seated(inner, (*inner.axes[:-1], "c"), size, length)
    return NoMatch("a comparison of two values", name)


def counting(lifter: Lifter, arg: Arg) -> str:
    """The name of the arange behind a value that counts along its last axis; '' where there is none."""
    made = lifter.instr(arg)
    if made is not None and made.word == "reshape" and lifter.type(made.args[0]).rank == 1:
        if made.types[0].shape[-1] != lifter.type(made.args[0]).shape[0]:
            return ""
        arg = made.args[0]
    made = lifter.instr(lifter.graph.behind(arg, ("cast", "same")))
    return made.results[0] if made is not None and made.word == "arange" else ""


def rule_invert(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """not (place < C)."""
    inner = lifter.lift(instr.args[0])
    if isinstance(inner, Hot) and inner.unit and lifter.type(instr.args[0]).dtype == "bool":
        return Cold(inner)
    if isinstance(inner, Cold):
        return inner.hot
    return replace(inner, negated=not inner.negated) if isinstance(inner, Below) else NoMatch("the inverse of a mask")


def _filled(lifter: Lifter, instr: Instr, hot: Hot, value: Arg, fill: Arg) -> Lift:
    """Numbers where a mask is 1, `fill` elsewhere."""
    if lifter.type(value).shape != instr.types[0].shape or len(hot.axes) != instr.types[0].rank:
        return NoMatch("a mask fills other axes", instr.results[0])
    if fill in (0, 0.0):
        return products.product(
            lifter, hot, NoMatch("numbers"), (Ref("mask"), value), Source(instr.results[0], hot.axes)
        )
    if sinks(fill, instr.types[0].dtype) and hot.at < 0:
        return Sunk(hot)
    return NoMatch(f"unchosen experts get {fill}, expected 0, -1e9 or less, or -inf", instr.results[0], 3)


def rule_where(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """where(mask, numbers, 0 or −∞)."""
    mask, value, fill = instr.args
    hot = lifter.lift(mask)
    made = lifter.instr(fill)
    if made is not None and made.word == "full":
        number = made.attr("value")
        fill = number if isinstance(number, int | float) else fill
    if isinstance(hot, Cold):
        return NoMatch("a mask's inverse selects numbers", instr.results[0])
    if isinstance(hot, Hot) and hot.unit:
        return _filled(lifter, instr, hot, value, fill)
    if isinstance(hot, Below) and not hot.negated and fill in (0, 0.0):
        return products.product(lifter, hot, lifter.lift(value), (mask, value), Source(instr.results[0], hot.axes))
    return hot if isinstance(hot, NoMatch) else NoMatch("a choice by something else than a mask", instr.results[0])


def rule_masked_fill(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """masked_fill(mask, place >= C, 0): the mask of the pairs that are kept; of scores: those of the chosen."""
    value, mask, fill = instr.args
    a, b = lifter.lift(value), lifter.lift(mask)
    if isinstance(b, Cold):
        return _filled(lifter, instr, b.hot, value, fill)
    if fill not in (0, 0.0) or not isinstance(b, Below) or not b.negated:
        return NoMatch("filled with something else than 0 where the capacity is exceeded", instr.results[0])
    kept = replace(b, negated=False)
    if isinstance(a, NoMatch):  # a gate a pair
        return products.product(lifter, kept, a, (mask, value), Source(instr.results[0], kept.axes))
    return NoMatch("a mask is filled; its condition has no value of its own", instr.results[0])
