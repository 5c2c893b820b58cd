"""Pairs that queue in another order than their tokens': places counted in that order, put back by its inverse.

%p = index(%ids, %order); %rank = places in %p; %place = scatter(·, %order, %rank)   →   places of %ids, queued as %p

A permutation of tokens maps pairs one to one, so that places stay places; which pairs are kept is then decided by the
places that the graph itself makes.
"""

from __future__ import annotations

from dataclasses import replace

from moec.ir.graph import Arg, Graph, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.capacity.masks import running
from moec.passes.rows.hot import Hot, Running, Source, whose
from moec.passes.rows.lift import Lift, Lifter, same


def unsorted(graph: Graph, base: str) -> tuple[str, str]:
    """(the choice whose rows, in another order, `base` is; that order): ('', '') where it is no such thing."""
    if "[" in base:
        return whose(base), base.partition("[")[2].removesuffix("]")
    made = graph.defs.get(base)
    if made is None or made.word != "index" or made.attr("dim") != 0 or len(made.args) != 2:
        return "", ""
    choice, order = made.args
    if not isinstance(choice, Ref) or not isinstance(order, Ref) or not _permutes(graph, order, choice):
        return "", ""
    return choice.name, order.name


def queued_as(graph: Graph, queue: str, base: str) -> bool:
    """Whether the pairs of `queue` are those of `base`, in their order or another."""
    return base in (queue, unsorted(graph, queue)[0])


def _permutes(graph: Graph, order: Ref, value: Ref) -> bool:
    """Whether `order` is a permutation of the rows of `value`: what sorts a vector of as many numbers."""
    made, kind = graph.defs.get(order.name), graph.types[order.name]
    sorts = made is not None and made.word == "sort" and order.name == made.results[1] and kind.rank == 1
    return sorts and same(kind.shape[0], graph.types[value.name].shape[0])


def _inverse(graph: Graph, back: Ref) -> str:
    """The permutation whose inverse `back` is, as what sorts it; '' where it is none."""
    made = graph.defs.get(back.name)
    if made is None or made.word != "sort" or made.results[1] != back.name or made.attr("descending"):
        return ""
    order = made.args[0]
    own = graph.defs.get(order.name) if isinstance(order, Ref) else None
    if not isinstance(order, Ref) or own is None or own.word != "sort" or own.results[1] != order.name:
        return ""
    return order.name if graph.types[order.name].rank == 1 else ""


def rule_index(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """A mask of choices in another order of tokens; places put back by the inverse of that order."""
    name = instr.results[0]
    if instr.attr("dim") != 0 or len(instr.args) != 2 or not isinstance(instr.args[1], Ref):
        return NoMatch("no row meaning for `index`", name)
    value, by = instr.args[0], instr.args[1]
    inner = lifter.lift(value)
    if isinstance(inner, NoMatch) or not isinstance(value, Ref):
        return inner
    plain = isinstance(inner, Hot) and inner == Hot(inner.base, inner.axes) and inner.axes[0] == "a"
    if isinstance(inner, Hot) and plain and "[" not in inner.base and _permutes(lifter.graph, by, value):
        return replace(inner, base=f"{inner.base}[{by.name}]")
    found = _back(lifter, inner, _inverse(lifter.graph, by), name)
    return found or NoMatch("masks or places are indexed by something else than an order of tokens", name)


def put_back(lifter: Lifter, instr: Instr) -> Lift | None:
    """Places written where the tokens in order come from: scatter, index_put into anything."""
    base, *rest = instr.args
    source, index = rest if instr.word == "index_put" and len(rest) == 2 else (rest[-1], rest[0])
    made = lifter.instr(base)
    adds = bool(dict(instr.attrs).get("accumulate", False))
    plain = instr.attr("dim") == 0 and not adds and made is not None and made.word == "full"
    if not plain or not isinstance(source, Ref) or lifter.type(source).shape != instr.types[0].shape:
        return None
    order = _spread(lifter, index, instr)
    return None if order is None else _back(lifter, lifter.lift(source), order.name, instr.results[0])


def _spread(lifter: Lifter, index: Arg, instr: Instr) -> Ref | None:
    """The vector of row numbers behind an index that names each row of the result whole."""
    kind = lifter.type(index)
    if kind.rank != 1 and (instr.word != "scatter" or kind.shape != instr.types[0].shape):
        return None
    order = lifter.graph.behind(index, ("expand", "reshape", "same"))
    if not isinstance(order, Ref) or lifter.type(order).rank != 1:
        return None
    at = index
    while isinstance(at, Ref) and at != order:  # rows stay along the first axis
        if not same(lifter.type(at).shape[0], lifter.type(order).shape[0]):
            return None
        made = lifter.instr(at)
        at = made.args[0] if made is not None else order
    return order


def _back(lifter: Lifter, inner: Lift, order: str, name: str) -> Lift | None:
    """Places in the order `order` as places of the choice itself."""
    held = running(inner)
    if not order or not isinstance(held, Running) or held.place.given or held.axes[0] != "a":
        return None
    choice, by = unsorted(lifter.graph, held.base)
    if by != order:
        return None
    return Running(choice, held.axes, held.place, Source(name, held.axes))
