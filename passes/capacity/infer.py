"""Capacity inference: how long an expert's queue can get, and drops that can never happen removed.

%kept = mul(%mask, lt(%place, C))   →   %kept = %mask      where every queue is proved to be at most C long
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from moec.ir.formulas import at_least
from moec.ir.graph import Arg, Dim, Graph, Instr, Ref, sweep
from moec.ir.match import NoMatch
from moec.passes.capacity.products import distinct, picked_along
from moec.passes.capacity.rules import hot_lifter
from moec.passes.rows.hot import Below, Cond, Hot, Pairs, Running, Spot, flat, letters_of, whose
from moec.passes.rows.lift import Lifter
from moec.pipeline import Facts, Outcome

PRODUCTS = frozenset({"mul", "bitwise_and", "logical_and"})


@dataclass(frozen=True)
class InferCapacity:
    """Remove comparisons with a capacity that no queue can exceed."""

    name: str = "infer-capacity"

    def run(self, graph: Graph, facts: Facts) -> Outcome:
        """The graph without drops that never happen."""
        if not any(i.word == "cumsum" for i in graph.instrs):
            return Outcome(graph)
        masks = hot_lifter(graph)
        changed = {i.results[0]: new for i in graph.instrs if (new := without_drop(masks, i)) is not None}
        instrs = (changed.get(i.results[0], i) if i.results else i for i in graph.instrs)
        return Outcome(sweep(graph.with_instrs(instrs)), len(changed))


def without_drop(masks: Lifter, instr: Instr) -> Instr | None:
    """The product as its other factor, when one factor says of every pair that it is kept."""
    if instr.word not in PRODUCTS or len(instr.args) != 2:
        return None
    for kept, other in (instr.args, instr.args[::-1]):
        below = masks.lift(kept)
        if not isinstance(below, Below) or below.negated or not always(masks, below.cond):
            continue
        if masks.type(other) == instr.types[0] and _only_pairs(masks, below, other):
            return Instr(instr.results, "same", (other,), instr.types, (), instr.loc)
    return None


def _only_pairs(masks: Lifter, below: Below, other: Arg) -> bool:
    """Whether the other factor is zero, or without meaning, wherever `below` may say no."""
    value = masks.lift(other)
    if isinstance(value, Hot | Spot):
        return below.place.given <= value.only
    if isinstance(value, Running):
        return below.place.given <= value.place.given
    return (
        isinstance(value, NoMatch) and isinstance(other, Ref) and not below.place.given and "e" not in flat(below.axes)
    )


def always(masks: Lifter, cond: Cond) -> bool:
    """Whether a condition is proved to hold for every pair that meets what it is given."""
    return cond.bound is not None and bool(cond.queue) and at_least(cond.bound, longest(masks, cond.queue))


def longest(masks: Lifter, queue: tuple[Pairs, ...]) -> Dim:
    """How many pairs one expert's queue can have at most."""
    return sympy.Add(*(_length(masks, pairs) for pairs in queue))


def _length(masks: Lifter, pairs: Pairs) -> Dim:
    kind = masks.graph.types[whose(pairs.base)]
    size = dict(zip(letters_of(kind.rank), kind.shape, strict=True))
    last = letters_of(kind.rank)[-1]
    once = last if distinct(masks, pairs.base, last) else ""  # a token's choices are different experts
    counted = [c for c in pairs.order if c != once]
    whole = sympy.Mul(*(size[c] for c in counted))
    return sympy.Min(whole, *(few for c in pairs.only if (few := _few(masks, c, counted)) is not None))


def _few(masks: Lifter, cond: Cond, counted: list[str]) -> Dim | None:
    """How many pairs of an expert a condition leaves, where each expert picks its best tokens."""
    found = picked_along(masks.graph, cond.witness)
    if found is None or "e" not in cond.axes or cond.axes[found[0]] != "".join(counted):
        return None
    return found[1]
