"""The rules that lift masks, running counts and capacity tensors to their meaning (`moec.passes.rows.hot`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moec.ir.formulas import size_of
from moec.ir.graph import Graph, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.capacity import priority, products
from moec.passes.capacity.choice import chosen
from moec.passes.capacity.masks import (
    Labelled,
    rule_compare,
    rule_invert,
    rule_masked_fill,
    rule_where,
    running,
    sizes_of,
    viewed,
)
from moec.passes.capacity.priority import put_back
from moec.passes.capacity.seat_ids import BEFORE
from moec.passes.rows.hot import (
    Below,
    Cond,
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
    relabel,
    sinks,
)
from moec.passes.rows.lift import Lift, Lifter, Rule, tried_first


def hot_lifter(graph: Graph) -> Lifter:
    """A lifter of masks and capacity tensors."""
    return Lifter(graph, HOT_RULES)


def rule_view(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """A reshape that only joins and splits whole axes, or adds and drops axes of size 1."""
    inner = viewed(lifter, instr)
    if not isinstance(inner, Labelled):
        return inner if isinstance(inner, NoMatch) else NoMatch("a view of a mask's inverse", instr.results[0])
    axes = relabel(inner.axes, sizes_of(lifter, instr.args[0], inner), instr.types[0].shape)
    if axes is None:
        return NoMatch(f"reshape {lifter.type(instr.args[0])} → {instr.types[0]} mixes axes", instr.results[0])
    return replace(inner, axes=axes)


def rule_permute(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Another order of axes."""
    inner, dims = viewed(lifter, instr), instr.attr("dims")
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
    place = running(lifter.lift(instr.args[0]))
    if isinstance(place, Running):
        seats = size_of(instr.attr("classes"))
        return Spot(place.base, (*place.axes, "c"), place.place, seats)
    found = chosen(lifter, instr.args[0])
    if isinstance(found, NoMatch):
        return found
    return Hot(found.base, (*found.axes, "e"))


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


def rule_scatter(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """full(0).scatter(experts, ids, numbers): a mask or gates a token; full(−∞): scores of the chosen alone."""
    back = put_back(lifter, instr) if instr.word == "scatter" else None
    if back is not None:
        return back
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
    if instr.word == "scatter" and sinks(value, instr.types[0].dtype):
        return Sunk(hot)
    return hot if value == 0.0 and source in (1, 1.0) else NoMatch(f"a scatter of {source} into {value}", name, 3)


def rule_put(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Places that were counted in another order of tokens, written back to their tokens."""
    return put_back(lifter, instr) or NoMatch(f"no mask is written by `{instr.word}`", instr.results[0])


def rule_clamp_max(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """min(place, n): still the place for pairs whose place is at most n."""
    inner, most = running(lifter.lift(instr.args[0])), instr.args[1]
    if not isinstance(inner, Running) or isinstance(most, Ref | tuple) or most is None:
        return inner if isinstance(inner, NoMatch) else NoMatch("a mask is clamped", instr.results[0])
    bound = size_of(most) - inner.place.offset + 1
    within = Cond("", inner.axes, inner.place.queue, bound, inner.place.given)
    place = replace(inner.place, given=inner.place.given | {within})
    return replace(inner, place=place, source=Source(instr.results[0], inner.axes))


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
    a = running(a)
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
    "index_put": rule_put,
    "index": priority.rule_index,
    "clamp_max": rule_clamp_max,
    "scatter_add": rule_scatter,  # into zeros, at experts that differ
    "softmax": rule_softmax,
    "slice": rule_slice,
    "where": rule_where,
    "reduce_any": rule_reduce,
}

HOT_RULES: Mapping[str, Rule] = tried_first(_MASKS, BEFORE)
"""The rules of masks and of seat numbers."""
