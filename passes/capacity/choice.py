"""The experts that pairs chose, as whole numbers of a graph."""

from __future__ import annotations

from moec.ir.graph import Arg, Ref
from moec.ir.match import NoMatch
from moec.passes.rows.hot import Chosen, letters_of
from moec.passes.rows.lift import INTEGER, Lifter


def chosen(lifter: Lifter, arg: Arg) -> Chosen | NoMatch:
    """Whole numbers of a graph as the experts that pairs choose, seen through views to where they were made."""
    found = lifter.lift(arg)
    if isinstance(found, Chosen):
        return found
    kind = lifter.type(arg)
    if (
        not isinstance(arg, Ref)
        or kind.dtype not in INTEGER
        or not 1 <= kind.rank <= 3
        or not isinstance(found, NoMatch)
    ):
        return NoMatch(f"{kind} are not the experts that tokens choose", str(arg))
    return Chosen(arg.name, letters_of(kind.rank))
