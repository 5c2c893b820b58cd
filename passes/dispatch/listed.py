"""Gates that a scatter filled in say who goes where, and a list of these places can be sorted by expert.

g = zeros[T, E].scatter(1, ids, w)              the choice where(w ≠ 0, ids, −1)
pairs = nonzero(g)                              its pairs (token, expert), token after token
order = pairs.sort(0)[1][:, 1]                  the pairs in expert order: rows x[pairs[order, 0]]
g[pairs[order, 0]].gather(1, pairs[order, 1:])  their gates

Each column of a sort along the first axis is sorted by itself: that of the experts gives the order, that of the tokens,
which ascend as they are listed, stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moec.ir.graph import Arg, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.capacity.products import nonnegative_value
from moec.passes.dispatch.weighed import Weighed
from moec.passes.rows.lift import FLOATS, First, Lift, Lifter, same
from moec.passes.rows.rows import Gate, Ids, OneHot, Rows, Space, Special, Token
from moec.passes.rows.token_axes import names_once


@dataclass(frozen=True)
class Listed(Special):
    """[P, 2]: the tokens and experts of a choice's pairs, or what came of sorting each of these columns.

    what  pairs | values (each column sorted) | places (where each column's values were)
    """

    space: Space
    choice: str
    what: str = "pairs"


def gates_mask(lifter: Lifter, gates: Arg, word: str) -> OneHot | None:
    """Where gates [T, E] are not 0, or above 0, if a scatter of numbers into zeros made them."""
    graph = lifter.graph
    found = graph.behind(gates, ("cast", "same"))
    made = lifter.instr(found)
    if made is None or made.word != "scatter" or made.attr("dim") != 1 or made.types[0].rank != 2:
        return None
    base, ids, numbers = made.args
    zeros = lifter.instr(graph.behind(base, ("cast", "same")))
    if zeros is None or zeros.word != "full" or zeros.attr("value") != 0:
        return None
    if not isinstance(ids, Ref) or not isinstance(numbers, Ref) or not names_once(graph, ids.name):
        return None
    kinds = lifter.type(ids), lifter.type(numbers)
    if kinds[1].dtype not in FLOATS or kinds[0].rank != 2 or not all(map(same, kinds[0].shape, kinds[1].shape)):
        return None
    word = "ne" if nonnegative_value(graph, numbers.name) else word
    chosen = Weighed(ids.name, numbers.name, word)
    lifter.weighed[chosen.name] = chosen
    return OneHot(chosen.name, ("t", "e"))


def compare_gates(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """g > 0, g ≠ 0."""
    left, right = instr.args
    kind = lifter.type(left)
    zero = isinstance(right, (int, float)) and not isinstance(right, bool) and right == 0
    return gates_mask(lifter, left, instr.word) if zero and kind.rank == 2 and kind.dtype in FLOATS else None


def cast_gates(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """g.bool()."""
    kind = lifter.type(instr.args[0])
    fits = instr.types[0].dtype == "bool" and kind.rank == 2 and kind.dtype in FLOATS
    return gates_mask(lifter, instr.args[0], "ne") if fits else None


def _mask(lifter: Lifter, arg: Arg) -> OneHot | None:
    """The mask over tokens and experts that a value is, or stands for where it is gates."""
    kind = lifter.type(arg)
    if kind.rank != 2:
        return None
    held = gates_mask(lifter, arg, "ne") if kind.dtype in FLOATS else lifter.lift(arg)
    return held if isinstance(held, OneHot) and held.axes == ("t", "e") and not held.anchor else None


def list_pairs(lifter: Lifter, instr: Instr, which: int) -> Lift | None:
    """nonzero(g), where(g): the places, as columns or one vector for each axis."""
    mask = _mask(lifter, instr.args[0])
    if mask is None:
        return None
    space = _listed(mask.choice)
    return (
        Listed(space, mask.choice) if instr.word == "nonzero" else Ids(space, ("token", "expert")[which], mask.choice)
    )


def _listed(choice: str) -> Space:
    """The order of a list: tokens ascend, and the experts of each."""
    return Space("listed", 0, choice)


def sort_list(lifter: Lifter, instr: Instr, which: int) -> Lift | None:
    """A list sorted along its first axis; or the vector of its experts."""
    held = lifter.lift(instr.args[0])
    if instr.attr("dim") != 0 or instr.attr("descending"):
        return None
    space = Space("sorted", 0, instr.results[1])
    if isinstance(held, Listed) and held.what == "pairs" and held.space.kind == "listed":
        return Listed(space, held.choice, ("values", "places")[which])
    if isinstance(held, Ids) and (held.what, held.space.kind) == ("expert", "listed"):
        return Ids(space, ("expert", "place")[which], held.choice)
    return None


def list_column(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """A column of a list, of its sorted columns, or of the order that sorts it."""
    held, (dim, start, stop) = lifter.lift(instr.args[0]), (instr.attr(n) for n in ("dim", "start", "stop"))
    if not isinstance(held, Listed) or dim != 1 or (start, stop) not in ((0, 1), (1, 2)):
        return None
    what = ("token", "expert")[start] if isinstance(start, int) else ""
    if held.what == "pairs":
        return Ids(held.space, what, held.choice)
    if held.what == "values":
        return Ids(held.space if what == "expert" else _listed(held.choice), what, held.choice)
    if what == "expert":
        return Ids(held.space, "place", held.choice)
    return NoMatch("a list of pairs is taken in the order that a sort gave its tokens", instr.results[0])


def index_list(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """A list, or one of its columns, in expert order."""
    table, *ids = instr.args
    at = lifter.lift(ids[0]) if len(ids) == 1 and instr.attr("dim") == 0 else None
    if not isinstance(at, Ids) or at.what != "place":
        return None
    held = lifter.lift(table)
    if isinstance(held, Listed | Ids) and held.space == _listed(at.choice):
        return replace(held, space=at.space)
    return (
        held if isinstance(held, NoMatch) else NoMatch("the order of a list of pairs indexes another", instr.results[0])
    )


def gather_gates(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """g[tokens].gather(1, experts[:, None]): each pair's gate."""
    table, wide = instr.args
    if instr.attr("dim") != 1 or lifter.type(wide).rank != 2 or lifter.type(wide).shape[1] != 1:
        return None
    rows, at = lifter.lift(table), lifter.lift(wide)
    if not isinstance(rows, Rows) or not isinstance(rows.row, Token) or not isinstance(at, Ids):
        return None
    if at.what != "expert" or rows.space != at.space or (rows.layout, at.layout) != ("flat", "flat"):
        return NoMatch("gates are gathered at the experts of other rows", instr.results[0])
    return Rows(rows.space, Gate(rows.row.value), "flat", at.choice)


BEFORE: Mapping[str, First] = {
    **dict.fromkeys(("gt", "ne"), compare_gates),
    "cast": cast_gates,
    **dict.fromkeys(("nonzero", "where_indices"), list_pairs),
    "sort": sort_list,
    "slice": list_column,
    "index": index_list,
    "gather": gather_gates,
}
