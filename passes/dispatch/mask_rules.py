"""The row rules of masks: which rows an expert has, and whether it has any."""

from __future__ import annotations

from dataclasses import replace

from moec.ir.graph import Arg, Instr, Ref
from moec.ir.match import NoMatch, nearest
from moec.passes.dispatch.gate_columns import has_gates
from moec.passes.dispatch.kept import cut_mask, kept_mask
from moec.passes.dispatch.mapped import pairs_of
from moec.passes.dispatch.partial import end_side, side_of
from moec.passes.dispatch.served import lost_pairs
from moec.passes.dispatch.thresholds import compared, table_axes
from moec.passes.dispatch.weighed import weighed
from moec.passes.rows.lift import INTEGER, Lift, Lifter
from moec.passes.rows.rows import (
    Anchor,
    Column,
    Idle,
    Ids,
    Masked,
    OneHot,
    PerExpert,
    Side,
    Space,
)
from moec.passes.rows.token_axes import choice_axes, names_once, order_of, token_axes


def rule_one_hot(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """one_hot(ids[T, k], n): a mask over t, s, e."""
    arg = instr.args[0]
    axes = choice_axes(lifter.graph, arg.name) if isinstance(arg, Ref) else ()
    if not isinstance(arg, Ref) or not axes:
        return NoMatch(f"one_hot of {lifter.type(arg)}, expected [T, k]", instr.results[0])
    return OneHot(arg.name, (*axes, "e"))


def rule_reduce(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Sums of a mask: over all but e, the rows of each expert; over s of masked weights, one weight a token."""
    inner, dims = lifter.lift(instr.args[0]), instr.attr("dims")
    assert isinstance(dims, tuple)
    if isinstance(inner, NoMatch):
        inner = kept_mask(lifter, instr.args[0]) or inner
    slots = lifter.type(instr.args[0]).rank - 1
    if isinstance(inner, Column) and len(dims) == slots + 1:
        return has_gates(lifter, inner) or NoMatch("a sum of gates that may be below 0", instr.results[0])
    if isinstance(inner, Masked) and dims == (slots,) and instr.word == "reduce_sum":
        return replace(inner, summed=True)
    if not isinstance(inner, OneHot):
        return (
            inner
            if isinstance(inner, NoMatch)
            else NoMatch(f"`{instr.word}` of {type(inner).__name__}", instr.results[0])
        )
    left = tuple(a for i, a in enumerate(inner.axes) if i not in dims)
    if left == ("e",):
        return PerExpert("hit" if instr.word == "reduce_any" else "counts", inner.choice)
    if inner.anchor and left == () and instr.word in ("reduce_any", "reduce_sum"):
        return Idle(inner.anchor, False, inner.choice)
    if inner.anchor and instr.word == "reduce_any" and not instr.attr("keepdim"):
        return replace(inner, axes=left)
    return NoMatch(f"`{instr.word}` over axes {dims} of a mask over {inner.axes}", instr.results[0])


def _every_expert(lifter: Lifter, instr: Instr) -> OneHot | None:
    """ids[T, k, 1] == arange(E): a mask over t, s, e, as one_hot makes it."""
    for wide, numbers in (instr.args, instr.args[::-1]):
        made, counted = lifter.instr(wide), lifter.instr(numbers)
        if instr.word != "eq" or made is None or made.word != "reshape" or counted is None or counted.word != "arange":
            continue
        ids, kind = made.args[0], lifter.type(made.args[0])
        if (
            isinstance(ids, Ref)
            and kind.dtype in INTEGER
            and (axes := choice_axes(lifter.graph, ids.name))
            and made.types[0].shape == (*kind.shape, 1)
        ):
            return OneHot(ids.name, (*axes, "e"))
    return None


def rule_compare(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """ids == e: a mask; counts > 0: which experts are hit."""
    left, right = instr.args
    by_number = compared(lifter, instr.word, left, right)
    if by_number is not None:
        return by_number
    by_weight = weighed(lifter, instr.word, left, right)
    if by_weight is not None:
        return by_weight
    lost = lost_pairs(lifter, instr)
    if lost is not None:
        return lost
    every = _every_expert(lifter, instr)
    if every is not None:
        return every
    a, b = lifter.lift(left), lifter.lift(right)
    if instr.word == "eq" and isinstance(a, Anchor) and not isinstance(b, Anchor):
        left, right, a, b = right, left, b, a
    met = _meets_item(lifter, left, a, b) if instr.word == "eq" and isinstance(b, Anchor) else None
    if met is not None:
        return met
    if isinstance(a, Anchor) and type(right) is int:
        side = side_of(lifter.graph, instr.word, a, right)
        if side is not None:
            return side
    if isinstance(a, PerExpert) and a.what == "counts" and (instr.word, right) in (("gt", 0), ("ge", 1), ("ne", 0)):
        return replace(a, what="hit")
    if isinstance(a, OneHot) and a.anchor and (instr.word, right) in (("gt", 0), ("ne", 0), ("eq", 1), ("ge", 1)):
        return a
    if isinstance(a, Idle) and not a.idle and (instr.word, right) in (("gt", 0), ("eq", 0), ("ne", 0)):
        return replace(a, idle=instr.word == "eq")
    misses = [found for found in (a, b) if isinstance(found, NoMatch)]
    what = "a comparison that selects no expert's rows: neither choices with the loop's expert nor counts with 0"
    return nearest([*misses, NoMatch(what, instr.results[0], 2)])


def _meets_item(lifter: Lifter, left: Arg, held: Lift, item: Anchor) -> Lift | None:
    """number == e: the loop's first or last expert, or none; hits == e: where e has rows; ids == e: who chose it."""
    if isinstance(held, PerExpert) and held.what == "hits":
        return OneHot(held.choice, ("h",), item.name)
    if isinstance(left, int) and not isinstance(left, bool):
        end = end_side(lifter.graph, item, left)
        if end is not None:
            return end
        lifter.beyond[item.name] = min(left, lifter.beyond.get(item.name, left))
        return Idle(item.name)
    axes = choice_axes(lifter.graph, left.name) if isinstance(left, Ref) else ()
    if isinstance(left, Ref) and lifter.type(left).dtype in INTEGER and axes:
        return OneHot(left.name, axes, item.name)
    return None


def rule_and(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """(ids == e) & kept."""
    found = [lifter.lift(arg) for arg in instr.args]
    for chosen, other in zip(found, instr.args[::-1], strict=True):
        if isinstance(chosen, OneHot) and chosen.anchor:
            cut = cut_mask(lifter, chosen, other)
            what = "the loop's mask meets something else than a mask of pairs that is the same in each turn"
            return cut or NoMatch(what, instr.results[0], 3)
    misses = [miss for miss in found if isinstance(miss, NoMatch)]
    return nearest([*misses, NoMatch("a conjunction that selects no expert's rows", instr.results[0])])


def rule_invert(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """not any row ⇔ no row."""
    inner = lifter.lift(instr.args[0])
    if isinstance(inner, Idle):
        return replace(inner, idle=not inner.idle)
    if isinstance(inner, Side):
        return replace(inner, above=not inner.above)
    return inner if isinstance(inner, NoMatch) else NoMatch("inverts a mask of rows", instr.results[0])


def rule_where_indices(lifter: Lifter, instr: Instr, which: int) -> Lift:
    """The places where a loop's mask is true: tokens and slots. Of hit experts: the list of them."""
    mask = lifter.lift(instr.args[0])
    if isinstance(mask, Column):
        mask = compared(lifter, "ne", instr.args[0], 0.0) or mask
    if isinstance(mask, PerExpert) and mask.what in ("hit", "counts"):
        return replace(mask, what="hits")
    pairs = pairs_of(mask, instr.args[0], which) if isinstance(mask, OneHot) and instr.word != "nonzero" else None
    if pairs is not None:
        return pairs
    whole = instr.word != "nonzero" or lifter.type(instr.args[0]).rank == 1  # nonzero gives [n, 2] for two axes
    if isinstance(mask, OneHot) and mask.anchor and whole:
        found = places(lifter, mask, which)
        if found is not None:
            return found
    return (
        mask
        if isinstance(mask, NoMatch)
        else NoMatch("places of something else than the loop's rows", instr.results[0])
    )


def places(lifter: Lifter, mask: OneHot, which: int) -> Ids | None:
    """Along one axis, the places where a mask over tokens, and perhaps slots, is true."""
    known = mask.choice in lifter.graph.types
    tokens = token_axes(lifter.graph, mask.choice) if known else table_axes(lifter, mask.choice) or ("t",)
    axes = mask.axes
    if known and "1" in axes and "s" not in choice_axes(lifter.graph, mask.choice):
        axes = tuple("s" if axis == "1" else axis for axis in axes)  # the one slot of a token: its index is 0
    if not 1 <= len(axes) <= len(tokens) + 1:
        return None
    if set(axes) - {"s"} not in ({"t"}, set(tokens)) or len(set(axes)) != len(axes):
        return None
    axis = axes[which]
    order = order_of(axes, tokens)
    if order == "ts" and known and names_once(lifter.graph, mask.choice):
        order = "t"  # a token comes where its one slot comes
    space = Space("loop", 0, mask.anchor, order)
    return Ids(space, {"t": "token", "s": "slot"}.get(axis, axis), mask.choice)


def masked_weights(lifter: Lifter, instr: Instr) -> Masked | None:
    """w[t, s]·[slot s chose e], when `instr` is that."""
    if instr.word != "mul":
        return None
    for mask, weights in (instr.args, instr.args[::-1]):
        held = lifter.lift(mask)
        if not isinstance(held, OneHot) or not isinstance(weights, Ref):
            continue
        known = choice_axes(lifter.graph, held.choice) if held.choice in lifter.graph.types else ("t", "s")
        if held.axes == known and held.anchor:
            return Masked(weights.name, held.choice, held.anchor, "s" not in known)
    return None
