"""The rules that lift masks, running counts and capacity tensors to their meaning (`moec.passes.hot`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moec.capacity import size_of
from moec.graph import Arg, Dim, Graph, Instr, Ref
from moec.match import NoMatch
from moec.passes import hot_products as products
from moec.passes.hot import (
    Below,
    Chosen,
    Cold,
    Flag,
    Hot,
    Pairs,
    Place,
    Running,
    Seats,
    Source,
    Spot,
    Sunk,
    Totals,
    flat,
    letters_of,
    relabel,
)
from moec.passes.hot_choice import chosen
from moec.passes.lift import Lift, Lifter, Rule
from moec.passes.seat_ids import BEFORE, Scaled, SeatIds

Labelled = Chosen | Hot | Flag | Running | Below | Totals | Spot | Seats | Scaled | SeatIds


def hot_lifter(graph: Graph) -> Lifter:
    """A lifter of masks and capacity tensors."""
    return Lifter(graph, HOT_RULES)


def sizes_of(lifter: Lifter, arg: Arg, value: Labelled) -> dict[str, Dim]:
    """The size of each letter in the labels of a value's axes."""
    base = value.pairs.base if isinstance(value, Totals) else "" if isinstance(value, Seats) else value.base
    shape = lifter.graph.types[base].shape if base else ()
    sizes = dict(zip(letters_of(len(shape)), shape, strict=True))
    if isinstance(value, Seats):
        sizes |= dict(value.sizes)
    singles = zip(value.axes, lifter.type(arg).shape, strict=True)
    return sizes | {label: dim for label, dim in singles if len(label) == 1 and label != "1"}


def rule_view(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """A reshape that only joins and splits whole axes, or adds and drops axes of size 1."""
    inner = _viewed(lifter, instr)
    if not isinstance(inner, Labelled):
        return inner if isinstance(inner, NoMatch) else NoMatch("a view of a mask's inverse", instr.results[0])
    axes = relabel(inner.axes, sizes_of(lifter, instr.args[0], inner), instr.types[0].shape)
    if axes is None:
        return NoMatch(f"reshape {lifter.type(instr.args[0])} → {instr.types[0]} mixes axes", instr.results[0])
    return replace(inner, axes=axes)


def _viewed(lifter: Lifter, instr: Instr) -> Lift:
    """What is viewed: a labelled value, or plain numbers of experts."""
    inner = lifter.lift(instr.args[0])
    return chosen(lifter, instr.args[0]) if isinstance(inner, NoMatch) else inner


def rule_permute(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Another order of axes."""
    inner, dims = _viewed(lifter, instr), instr.attr("dims")
    if not isinstance(inner, Labelled) or not isinstance(dims, tuple):
        return inner if isinstance(inner, NoMatch) else NoMatch("a view of a mask's inverse", instr.results[0])
    return replace(inner, axes=tuple(inner.axes[int(str(d))] for d in dims))


def rule_cast(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """A cast keeps masks and counts; to bool it says where a value is not zero."""
    inner = lifter.lift(instr.args[0])
    if isinstance(inner, Spot | Seats | Hot) and instr.types[0].dtype == "bool":
        return _nonzero(lifter, instr, inner)
    return inner


def _nonzero(lifter: Lifter, instr: Instr, inner: Spot | Seats | Hot) -> Lift:
    if isinstance(inner, Seats):
        return replace(inner, mask=True)
    if isinstance(inner, Hot) and inner.unit:
        return inner
    if isinstance(inner, Spot) and not inner.factors:
        return inner
    return NoMatch("where gated values are not zero", instr.results[0])


def rule_same(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """The same value under another name."""
    return lifter.lift(instr.args[0])


def rule_one_hot(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """one_hot of experts: a mask; one_hot of places: seats."""
    place = _running(lifter.lift(instr.args[0]))
    if isinstance(place, Running):
        seats = size_of(instr.attr("classes"))
        return Spot(place.base, (*place.axes, "c"), place.place, seats)
    found = chosen(lifter, instr.args[0])
    if isinstance(found, NoMatch):
        return found
    return Hot(found.base, (*found.axes, "e"))


def _running(value: Lift) -> Lift:
    """A mask that is the pair's place at the pair, as a place; anything else as it is."""
    if not isinstance(value, Hot) or value.place is None or value.factors or value.at >= 0:
        return value
    place = replace(value.place, given=value.only | value.place.given)
    return Running(value.base, value.axes, place, Source("", value.axes))


def rule_cumsum(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """The running count of a mask: a pair's place in its expert's queue, counted from 1."""
    inner, dim, name = lifter.lift(instr.args[0]), instr.attr("dim"), instr.results[0]
    if isinstance(inner, NoMatch):
        return inner
    if not isinstance(inner, Hot) or not inner.unit or not isinstance(dim, int):
        return NoMatch("a running sum of something else than a mask of choices", name)
    label = inner.axes[dim]
    if label in ("1", "e"):
        return NoMatch(f"the running count is along axis {dim}, expected the tokens", name)
    if inner.summed and not products.distinct(lifter, inner.base, inner.summed):
        return NoMatch("a token may choose an expert twice", name)
    pairs = Pairs(inner.base, label + inner.summed, inner.only)
    place = Place((pairs,), 1, inner.only)
    return Running(inner.base, inner.axes, place, Source(name, inner.axes))


def rule_reduce(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Sums over experts: a number a pair; over pairs: totals; over slots: a mask a token."""
    inner, dims, name = lifter.lift(instr.args[0]), instr.attr("dims"), instr.results[0]
    if isinstance(inner, NoMatch) or not isinstance(dims, tuple):
        return inner if isinstance(inner, NoMatch) else NoMatch("a sum over unknown axes", name)
    if not isinstance(inner, Hot | Seats | Spot):
        return NoMatch(f"a sum of {type(inner).__name__}", name)
    gone = {int(str(d)) for d in dims}
    keep = bool(instr.attr("keepdim"))
    axes = tuple("1" if i in gone else a for i, a in enumerate(inner.axes) if keep or i not in gone)
    return products.summed(lifter, inner, flat(tuple(inner.axes[i] for i in sorted(gone))), Source(name, axes))


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
    inner = _running(inner)
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
        inner = _viewed(lifter, Instr(("",), "same", (ids,), (lifter.type(ids),)))
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
    if fill == float("-inf") and hot.at < 0:
        return Sunk(hot)
    return NoMatch(f"unchosen experts get {fill}, expected 0 or -inf", instr.results[0], 3)


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


def rule_scatter(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """full(0).scatter(experts, ids, numbers): a mask or gates a token; full(−∞): scores of the chosen alone."""
    base, index, source = instr.args
    name, made = instr.results[0], lifter.instr(base)
    found = chosen(lifter, index)
    if isinstance(found, NoMatch):
        return found
    rank = instr.types[0].rank
    if instr.attr("dim") != rank - 1 or len(found.axes) != rank or lifter.type(index).rank != rank:
        return NoMatch("a scatter along another axis than experts", name)
    slots = found.axes[-1]
    if len(slots) != 1 or not (slots == "1" or products.distinct(lifter, found.base, slots)):
        return NoMatch("a scatter at experts that may be the same", name)
    if made is None or made.word != "full":
        return NoMatch("a scatter into something else than a constant", name)
    axes = (*found.axes[:-1], "e")
    hot = Hot(found.base, axes, summed="" if slots == "1" else slots)
    value = made.attr("value")
    if isinstance(source, Ref) and value == 0.0:
        if lifter.type(source).shape != lifter.type(index).shape:
            return NoMatch("a scatter of part of its source", name)
        return replace(hot, factors=(Source(source.name, found.axes),))
    if value == float("-inf"):
        return Sunk(hot)
    return hot if value == 0.0 and source in (1, 1.0) else NoMatch(f"a scatter of {source} into {value}", name, 3)


def rule_softmax(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """softmax of scores that are −∞ but for the chosen: gates of the chosen."""
    inner = lifter.lift(instr.args[0])
    if not isinstance(inner, Sunk) or inner.axes[int(str(instr.attr("dim")))] != "e":
        return inner if isinstance(inner, NoMatch) else NoMatch("softmax of something else than scores")
    return replace(inner.hot, factors=(Source(instr.results[0], inner.axes),))


def rule_slice(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """One expert's column."""
    inner, dim = lifter.lift(instr.args[0]), int(str(instr.attr("dim")))
    start, stop = int(str(instr.attr("start"))), int(str(instr.attr("stop")))
    if not isinstance(inner, Hot) or inner.axes[dim] != "e" or stop != start + 1:
        return inner if isinstance(inner, NoMatch) else NoMatch("a slice of a mask", instr.results[0])
    axes = tuple("1" if i == dim else a for i, a in enumerate(inner.axes))
    return replace(inner, axes=axes, at=start)


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


def rule_offset(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """place ± a number; place + totals of an earlier queue; running count − the mask itself; sums of seats."""
    left, right = instr.args
    a, b, name = lifter.lift(left), lifter.lift(right), instr.results[0]
    minus = instr.word == "sub"
    if left in (0, 0.0) or right in (0, 0.0):  # where a sum begins
        return (b if left in (0, 0.0) else a) if not minus else NoMatch("0 less a value", name)
    if isinstance(a, Seats) and isinstance(b, Seats) and not minus and a.axes == b.axes:
        if a.mask != b.mask:
            return NoMatch("masks and weights of seats are added", name)
        return replace(a, terms=a.terms + b.terms)
    if isinstance(b, Running) and not isinstance(a, Running) and not minus:
        a, b, left, right = b, a, right, left
    a = _running(a)
    if not isinstance(a, Running):
        return a if isinstance(a, NoMatch) else NoMatch(f"`{instr.word}` of {type(a).__name__}", name)
    if isinstance(right, int | float) and int(right) == right:
        place = replace(a.place, offset=a.place.offset + (-int(right) if minus else int(right)))
    elif isinstance(b, Totals) and not minus:
        place = replace(a.place, queue=(b.pairs, *a.place.queue))
    elif isinstance(b, Hot) and minus and b.unit and b.axes == a.axes and b.base == a.base:
        if b.only - a.place.given:
            return NoMatch("a running count less another mask", name)
        place = replace(a.place, offset=a.place.offset - 1)
    else:
        return b if isinstance(b, NoMatch) else NoMatch(f"a place and {type(b).__name__}", name)
    return Running(a.base, a.axes, place, Source(name, a.axes))


def rule_mul(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Products with broadcasting."""
    left, right = instr.args
    a, b = lifter.lift(left), lifter.lift(right)
    out = Source(instr.results[0], ())
    if isinstance(a, NoMatch):
        a, b, left, right = b, a, right, left
    if isinstance(a, NoMatch):
        return a
    return products.product(lifter, a, b, (left, right), out, logical=instr.word == "logical_and")


def rule_div(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Gates divided by something are zero where they were."""
    a, name = lifter.lift(instr.args[0]), instr.results[0]
    if not isinstance(a, Flag | Hot) or len(a.axes) != instr.types[0].rank:
        return a if isinstance(a, NoMatch) else NoMatch(f"a quotient of {type(a).__name__}", name)
    if isinstance(a, Hot) and (a.place is not None or a.at >= 0):
        return NoMatch("a quotient of places", name)
    source = Source(name, a.axes)
    return replace(a, factors=(source,)) if isinstance(a, Hot) else Flag(a.base, a.axes, a.only, source)


def rule_contract(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """einsum of masks: a product with aligned axes, then a sum."""
    return products.contraction(lifter, instr)


def rule_gather(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """gather(places for every expert, the choice): the pair's own place."""
    inner, name = lifter.lift(instr.args[0]), instr.results[0]
    if not isinstance(inner, Running | Below):
        return inner if isinstance(inner, NoMatch) else NoMatch(f"a gather of {type(inner).__name__}", name)
    found, dim = chosen(lifter, instr.args[1]), instr.attr("dim")
    if isinstance(found, NoMatch) or found.base != inner.base or not isinstance(dim, int) or inner.axes[dim] != "e":
        return NoMatch("gathered at something else than the pair's own expert", name)
    rows = tuple(a for i, a in enumerate(inner.axes) if i != dim)
    if tuple(a for i, a in enumerate(found.axes) if i != dim) != rows:
        return NoMatch("gathered for other pairs", name)
    own = replace(inner, axes=found.axes, source=Source(name, found.axes))
    return replace(own, inverse=own.negated) if isinstance(own, Below) else own


def _after(word: str, then: Rule) -> Rule:
    """A rule that is tried after the one for seat numbers, where there is one."""
    first = BEFORE.get(word)
    if first is None:
        return then

    def rule(lifter: Lifter, instr: Instr, which: int) -> Lift:
        found = first(lifter, instr, which)
        return then(lifter, instr, which) if found is None else found

    return rule


_MASKS: Mapping[str, Rule] = {
    "one_hot": rule_one_hot,
    "reshape": rule_view,
    "permute": rule_permute,
    "cast": rule_cast,
    "same": rule_same,
    "cumsum": rule_cumsum,
    "reduce_sum": rule_reduce,
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), rule_compare),
    "invert": rule_invert,
    "masked_fill": rule_masked_fill,
    "add": rule_offset,
    "sub": rule_offset,
    **dict.fromkeys(("mul", "bitwise_and", "logical_and"), rule_mul),
    "div": rule_div,
    "contract": rule_contract,
    "gather": rule_gather,
    "scatter": rule_scatter,
    "softmax": rule_softmax,
    "slice": rule_slice,
    "where": rule_where,
    "reduce_any": rule_reduce,
}

HOT_RULES: Mapping[str, Rule] = {word: _after(word, rule) for word, rule in _MASKS.items()}
"""The rules of masks and of seat numbers."""
