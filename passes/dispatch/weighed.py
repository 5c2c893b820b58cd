"""Rows that a loop selects by their weight: tokens whose weight for the expert is above 0, or is not 0.

g = (w · (ids == e)).sum(-1); rows = where(g > 0)   →   the rows of the choice where(w > 0, ids, −1)

The weight of a token that did not choose the expert is 0, and such a token is not among the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir.graph import Arg, Instr, Ref, Type
from moec.ir.match import NoMatch
from moec.passes.rows.lift import Lifter, same
from moec.passes.rows.pairs import Writer
from moec.passes.rows.rows import Masked, OneHot
from moec.passes.rows.token_axes import at_choice, choice_axes, names_once


@dataclass(frozen=True)
class Weighed:
    """The pairs of `choice` whose number `value` compares so with 0."""

    choice: str
    value: str
    word: str

    @property
    def name(self) -> str:
        """What the choice is known by while it is matched: a part of `choice`."""
        return f"{self.choice}#{self.word}0:{self.value}"


def weighed(lifter: Lifter, word: str, left: Arg, right: Arg) -> OneHot | None:
    """g > 0 of masked weights that were summed over slots."""
    if word not in ("gt", "ne") or isinstance(right, (bool, Ref)) or right != 0 or lifter.type(left).rank != 1:
        return None
    held = lifter.lift(left)
    if not isinstance(held, Masked) or not held.summed or held.choice not in lifter.graph.types:
        return None
    if choice_axes(lifter.graph, held.choice) != ("t", "s") or not names_once(lifter.graph, held.choice):
        return None
    found = Weighed(held.choice, held.value, word)
    lifter.weighed[found.name] = found
    return OneHot(found.name, ("t",), held.anchor)


def weighed_choice(
    lifter: Lifter, root: Instr, name: str, weight: str, by_expert: bool
) -> tuple[tuple[Instr, ...], str, str] | NoMatch:
    """Instructions, w[T, k] and e[T, k] of a choice known by `lifter.weighed`, −1 where a pair is left out.

    by_expert: the weight is gates g[T, E].
    """
    found = lifter.weighed[name]
    assert isinstance(found, Weighed)
    out = Writer(lifter.graph, root)
    if by_expert:
        picked = at_choice(out, weight, found.choice)
        if isinstance(picked, NoMatch):
            return picked
        weight = picked
    kind, numbers = lifter.graph.types[found.choice], lifter.graph.types[found.value]
    given = out.type(weight) if weight else kind
    if not all(t.rank == 2 and all(map(same, t.shape, kind.shape)) for t in (numbers, given)):
        return NoMatch(f"weights are {numbers} and {given} for choices {kind}", found.value)
    runs = out.emit(found.word, (Ref(found.value), 0), Type("bool", kind.shape))
    chosen = out.emit("where", (Ref(runs), Ref(found.choice), -1), kind)
    return tuple(out.instrs), weight, chosen
