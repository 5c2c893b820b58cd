"""Products and sums of masks: one-hot of experts times one-hot of places is a table of seats."""

from __future__ import annotations

from dataclasses import replace

from moec.ir.graph import Arg, Dim, Graph, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.raising.word_contract import equation_of
from moec.passes.rows.hot import (
    Below,
    Cond,
    Flag,
    Hot,
    Labels,
    Pairs,
    Running,
    Seats,
    Source,
    Spot,
    Term,
    Totals,
    broadcast,
    flat,
    letters_of,
    whose,
)
from moec.passes.rows.lift import Lift, Lifter


def product(lifter: Lifter, a: Lift, b: Lift, args: tuple[Arg, ...], out: Source, logical: bool = False) -> Lift:
    """a · b, both broadcast; a NoMatch stands for numbers that nothing is known of; `logical`: and."""
    if isinstance(a, NoMatch):
        a, b, args = b, a, args[::-1]
    if isinstance(a, NoMatch):
        return a
    mine = getattr(a, "axes", None)
    theirs = _dense_axes(lifter, args[1], mine or ()) if isinstance(b, NoMatch) else getattr(b, "axes", None)
    if mine is None or theirs is None:
        return NoMatch("a product whose axes are not understood", out.name)
    if logical and isinstance(b, NoMatch) and isinstance(a, Hot | Spot) and isinstance(args[1], Ref):
        axes = broadcast(mine, theirs) or ()
        return replace(a, axes=axes, only=a.only | {Cond(args[1].name, theirs)})
    return multiplied(lifter, (a, mine), (b, theirs), (args[1], theirs), out)


def _dense_axes(lifter: Lifter, arg: Arg, like: Labels) -> Labels | None:
    """The labels of unknown numbers that broadcast to a labelled value; None where they bring axes of their own."""
    shape = lifter.type(arg).shape
    like = ("1",) * (len(shape) - len(like)) + like
    labels = like[len(like) - len(shape) :]
    if any(dim != 1 and label == "1" for dim, label in zip(shape, labels, strict=True)):
        return None
    return tuple("1" if dim == 1 else label for dim, label in zip(shape, labels, strict=True))


def multiplied(
    lifter: Lifter, left: tuple[Lift, Labels], right: tuple[Lift, Labels], numbers: tuple[Arg, Labels], out: Source
) -> Lift:
    """The product of two values with these labels; `numbers`: the second value and the labels of its own axes."""
    (a, mine), (b, theirs) = left, right
    axes = broadcast(mine, theirs)
    if axes is None:
        return NoMatch(f"a product of axes {mine} and {theirs}", out.name)
    if isinstance(b, NoMatch):
        return _times_numbers(lifter, a, *numbers, axes, out)
    for x, y in ((a, b), (b, a)):
        found = _pair(x, y, axes, lifter, out)
        if found is not None:
            return found
    return NoMatch(f"a product of {type(a).__name__} and {type(b).__name__}", out.name)


def _pair(  # noqa: C901  # one table of products
    x: Lift, y: Lift, axes: Labels, lifter: Lifter, out: Source
) -> Lift | None:
    """x · y for two known values; None where the pair is not in this order, or not known."""
    if isinstance(x, Hot) and isinstance(y, Hot | Running | Below | Flag) and x.base != y.base:
        return NoMatch("a product of masks of two choices", out.name)
    match x, y:
        case Hot(), Hot() if x.at != y.at or not (x.summed == y.summed or "" in (x.summed, y.summed)):
            return NoMatch("a product of masks of two experts", out.name)
        case Hot(), Hot():
            place, only, factors = x.place or y.place, x.only | y.only, x.factors + y.factors
            slots = x.summed if x.summed == y.summed else ""  # a token's choices differ: each pair has its own number
            return replace(x, axes=axes, only=only, factors=factors, place=place, summed=slots)
        case Hot(), Running():
            return replace(x, axes=axes, place=y.place) if x.unit else NoMatch("a place times a gate", out.name)
        case Hot() | Spot(), Below():
            return _kept(x, y, axes, out)
        case Hot() | Spot(), Flag():
            more = () if y.unit else (y.source,)
            return replace(x, axes=axes, only=x.only | y.only, factors=x.factors + more)
        case Hot(), Spot():
            return _table(lifter, x, y, axes, out)
        case Seats(), Hot():
            same = all(t.base == y.base for t in x.terms) and y.place is None and y.at < 0
            if not same or (x.mask and not y.unit):
                return NoMatch("gates of another choice", out.name)
            terms = tuple(replace(t, only=t.only | y.only, factors=t.factors + y.factors) for t in x.terms)
            return replace(x, axes=axes, terms=terms)
        case Seats(), Flag():
            more = () if y.unit else (y.source,)
            terms = tuple(replace(t, only=t.only | y.only, factors=t.factors + more) for t in x.terms)
            known = all(t.base == y.base for t in x.terms) and not x.mask
            return replace(x, axes=axes, terms=terms) if known else NoMatch("gates of another choice", out.name)
        case Running(), Below() if x.base == y.base and not y.negated:
            given = x.place.given | {y.cond}
            return replace(x, axes=axes, place=replace(x.place, given=given), source=Source(out.name, axes))
        case Running(), Flag() if x.base == y.base and y.unit:
            given = x.place.given | y.only
            return replace(x, axes=axes, place=replace(x.place, given=given), source=Source(out.name, axes))
        case Flag(), Below() if not y.negated and x.base == y.base:
            return Flag(x.base, axes, x.only | {y.cond}, Source(out.name, axes), x.unit)
        case Flag(), Flag() if x.base == y.base:
            return Flag(x.base, axes, x.only | y.only, Source(out.name, axes), x.unit and y.unit)
        case _:
            return None


def _kept(x: Hot | Spot, y: Below, axes: Labels, out: Source) -> Lift:
    if y.negated:
        return NoMatch("pairs beyond the capacity are kept", out.name)
    return replace(x, axes=axes, only=x.only | {y.cond})


def _table(lifter: Lifter, hot: Hot, spot: Spot, axes: Labels, out: Source) -> Lift:
    """Experts × places."""
    if hot.base != spot.base or hot.place is not None or hot.at >= 0:
        return NoMatch("experts and places of different pairs", out.name)
    term = Term(hot.base, spot.place, spot.seats, hot.only | spot.only, hot.factors + spot.factors, hot.summed)
    shape = lifter.graph.types[whose(hot.base)].shape
    sizes = dict(zip(letters_of(len(shape)), shape, strict=True))
    return Seats(axes, (term,), tuple(sizes.items()))


def _times_numbers(lifter: Lifter, a: Lift, arg: Arg, theirs: Labels, axes: Labels, out: Source) -> Lift:
    """A known value times numbers: gates, or a mask of the user's own."""
    mask = boolean(lifter, arg)
    if mask and ((isinstance(a, Below) and not a.negated) or (isinstance(a, Flag) and a.unit)):
        known = a.only if isinstance(a, Flag) else frozenset({a.cond})
        return Flag(a.base, axes, known | {Cond(mask, theirs)}, Source(out.name, axes), True)
    if isinstance(a, Below) and not a.negated:
        return Flag(a.base, axes, frozenset({a.cond}), Source(out.name, axes))
    if isinstance(a, Flag):
        return Flag(a.base, axes, a.only, Source(out.name, axes))
    if isinstance(a, Hot | Spot) and mask:
        return replace(a, axes=axes, only=a.only | {Cond(mask, theirs)})
    if not isinstance(arg, Ref):
        return NoMatch("a mask times a number", out.name)
    source = Source(arg.name, theirs)
    if isinstance(a, Hot) and a.place is None:
        return replace(a, axes=axes, factors=(*a.factors, source))
    if isinstance(a, Spot):
        return replace(a, axes=axes, factors=(*a.factors, source))
    if isinstance(a, Seats) and not a.mask:
        terms = tuple(replace(t, factors=(*t.factors, source)) for t in a.terms)
        return replace(a, axes=axes, terms=terms)
    return NoMatch(f"{type(a).__name__} times numbers", out.name)


def boolean(lifter: Lifter, arg: Arg) -> str:
    """The name of a value that is 0 or 1, being a mask in whatever dtype; '' where that is not known."""
    if not isinstance(arg, Ref):
        return ""
    behind = lifter.graph.behind(arg, ("cast", "same", "reshape", "detach"))
    known = lifter.type(behind).dtype == "bool" or picked_along(lifter.graph, arg.name) is not None
    return arg.name if known else ""


def picked_along(graph: Graph, name: str) -> tuple[int, Dim] | None:
    """zeros.scatter(axis, topk(…, n, axis), 1): the axis, and at most how many places along it are 1."""
    behind = graph.behind(Ref(name), ("cast", "same", "detach"))
    made = graph.defs.get(behind.name) if isinstance(behind, Ref) else None
    axis = made.attr("dim") if made is not None and made.word == "scatter" else None
    if made is None or not isinstance(axis, int) or made.args[2] not in (1, 1.0):
        return None
    zeros, where = made.args[:2]
    index = graph.defs.get(where.name) if isinstance(where, Ref) else None
    if not graph.is_zero(zeros) or index is None or index.word != "topk" or index.attr("dim") != axis:
        return None
    return axis, index.types[1].shape[axis]


def seated(inner: Running, axes: Labels, size: Dim, length: str) -> Spot:
    """places[…, None] == arange(C): a place beyond the seats has none."""
    place = inner.place
    bound = size - place.offset
    kept = Cond(inner.source.name, inner.source.axes, place.queue, bound, place.given, length)
    return Spot(inner.base, axes, place, size, frozenset({kept}))


def summed(lifter: Lifter, inner: Hot | Seats | Spot, gone: str, out: Source) -> Lift:
    """The sum over the axes of these letters; `out` names the result and its axes."""
    if isinstance(inner, Seats):
        slots = all(letter in letters_of(3) for letter in gone)
        terms = tuple(replace(t, summed=t.summed + gone) for t in inner.terms)
        known = slots and not inner.mask
        return replace(inner, axes=out.axes, terms=terms) if known else NoMatch("a sum over seats", out.name)
    if isinstance(inner, Spot):
        return NoMatch("a sum of places", out.name)
    if gone == "e" and inner.place is not None:
        return Running(inner.base, out.axes, replace(inner.place, given=inner.only | inner.place.given), out)
    if gone == "e":
        return Flag(inner.base, out.axes, inner.only, out, inner.unit and not inner.summed)
    if "e" in gone or inner.place is not None or (inner.at >= 0 and not distinct(lifter, inner.base, gone)):
        return NoMatch("a sum over experts and tokens", out.name)
    if distinct(lifter, inner.base, gone):
        return replace(inner, axes=out.axes, summed=inner.summed + gone)
    if inner.unit and (not inner.summed or distinct(lifter, inner.base, inner.summed)):
        return Totals(Pairs(inner.base, gone + inner.summed, inner.only), out.axes)
    return NoMatch("a sum of gates over tokens", out.name)


def distinct(lifter: Lifter, base: str, letters: str) -> bool:
    """Whether a choice never names an expert twice along the axes `letters`: top-k's own axis."""
    kind, made = lifter.graph.types[whose(base)], lifter.graph.defs.get(whose(base))
    last = letters_of(kind.rank)[-1]
    while made is not None and made.word in ("slice", "same"):  # some of those that are named once are named once
        made = lifter.graph.defs.get(made.uses[0])
    if made is not None and made.word == "index" and made.attr("dim") == 0 and isinstance(made.args[0], Ref):
        made = lifter.graph.defs.get(made.args[0].name) if kind.rank > 1 else None  # rows of a choice, in any order
    return letters == last and made is not None and made.word == "topk" and made.attr("dim") == kind.rank - 1


def contraction(lifter: Lifter, instr: Instr) -> Lift:
    """einsum of two operands, one of them a mask: aligned, multiplied, summed."""
    name = instr.results[0]
    (left, right), out = equation_of(instr)
    a, b = (lifter.lift(arg) for arg in instr.args)
    args = instr.args
    if isinstance(a, NoMatch):
        a, b, left, right, args = b, a, right, left, args[::-1]
    mine = getattr(a, "axes", None)
    if isinstance(a, NoMatch) or mine is None:
        return a if isinstance(a, NoMatch) else NoMatch("a contraction of values without axes", name)
    label = dict(zip(left, mine, strict=True))
    if isinstance(b, NoMatch):
        if not set(right) <= set(left):
            return NoMatch("a mask contracted with something that has axes of its own", name)
        theirs = tuple(label[c] for c in right)
    else:
        theirs = getattr(b, "axes", ())
    for c, own in zip(right, theirs, strict=True):
        if label.setdefault(c, own) != own:
            return NoMatch(f"a contraction of axes {label[c]} and {own}", name)
    order = out + "".join(c for c in dict.fromkeys(left + right) if c not in out)
    x = tuple(label[c] if c in left else "1" for c in order)
    y = tuple(label[c] if c in right else "1" for c in order)
    own = tuple(label[c] for c in right)
    whole = multiplied(lifter, (a, x), (b, y), (args[1], own), Source(name, ()))
    gone = flat(tuple(label[c] for c in order[len(out) :]))
    if not gone or isinstance(whole, NoMatch):
        return whole
    axes = tuple(label[c] for c in out)
    if not isinstance(whole, Hot | Seats | Spot):
        return NoMatch(f"a sum of {type(whole).__name__}", name)
    return summed(lifter, whole, gone, Source(name, axes))


_KEEPS = frozenset(
    [
        "reshape",
        "permute",
        "cast",
        "same",
        "slice",
        "index",
        "gather",
        "topk",
        "max",
        "reduce_sum",
        "reduce_mean",
        "reduce_amax",
        "expand",
        "detach",
    ]
)
_ALL = frozenset(["mul", "div", "add", "maximum", "contract", "cumsum", "scatter", "where"])
_IS = frozenset(
    [
        "softmax",
        "sigmoid",
        "softplus",
        "relu",
        "exp",
        "one_hot",
        "arange",
        "lt",
        "le",
        "gt",
        "ge",
        "eq",
        "ne",
        "full",
        "abs",
        "square",
    ]
)


def nonnegative(graph: Graph, seats: Seats) -> bool:
    """Whether every number that pairs bring is ≥ 0, by how it was made."""
    return all(nonnegative_value(graph, f.name) for t in seats.terms for f in t.factors)


def nonnegative_value(graph: Graph, name: str) -> bool:
    """Whether a value is ≥ 0, by how it was made."""
    return _nonnegative(graph, name, 40)


def _nonnegative(graph: Graph, name: str, depth: int) -> bool:
    made = graph.defs.get(name)
    if made is None or depth == 0:
        return False
    if made.types[0].dtype == "bool" or made.word in _IS:
        value = made.attr("value") if made.word == "full" else 0.0
        return isinstance(value, int | float) and value >= 0
    if made.word in _KEEPS:
        return _nonnegative(graph, made.uses[0], depth - 1)
    if made.word == "clamp_min":
        return isinstance(made.args[1], int | float) and made.args[1] >= 0
    numbers = [a for a in made.args if isinstance(a, int | float)]
    return (
        made.word in _ALL and all(n >= 0 for n in numbers) and all(_nonnegative(graph, u, depth - 1) for u in made.uses)
    )
