"""A loop that runs its expert on every token: what it adds is zero but at the rows of those that chose the expert.

for e: if any: y += (w·(ids == e)).sum(-1)[:, None] · expert_e(x)   →   for e: y[rows(e)] += w·expert_e(x[rows(e)])

What an expert makes of a token depends on that token alone, so rows taken from its results are results of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moec.ir.graph import Arg, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.dispatch.gate_columns import chosen_by
from moec.passes.dispatch.turns import turns_in
from moec.passes.raising.word_contract import equation_of
from moec.passes.rows.lift import FLOATS, First, Lift, Lifter, Rule, tried_first
from moec.passes.rows.rows import (
    Anchor,
    Apply,
    Column,
    Dot,
    Expert,
    Gate,
    Ids,
    Masked,
    OneHot,
    Rows,
    Slot,
    Space,
    Token,
)
from moec.passes.rows.token_axes import choice_axes, is_token, names_once, one_expert, order_of, token_axes

EVERY = "every"
"""The kind of a space of all tokens; its key is the loop to whose rows a factor of zeros has limited them, or ''."""


def _contract(lifter: Lifter, instr: Instr) -> Lift | None:
    """Every token times the matrix of the loop's expert."""
    for (x, w), (left, right) in _both_ways(instr):
        matrix, rows = lifter.lift(w), lifter.lift(x)
        if not isinstance(matrix, Expert) or len(matrix.order) != 2 or len(right) != 2:
            continue
        if _plain(rows) and not _made_in_turn(lifter, x, w):
            rows = _tokens(lifter, x)
        if not isinstance(rows, Rows) or rows.space.kind != EVERY:
            return None
        shared, out = left[-1], equation_of(instr)[1]
        if shared not in right or shared in out or out != left[:-1] + right.replace(shared, ""):
            return None
        return replace(rows, row=Dot(rows.row, matrix, right.index(shared)))
    return None


def _both_ways(instr: Instr) -> tuple[tuple[tuple[Arg, Arg], tuple[str, str]], ...]:
    (left, right), _ = equation_of(instr)
    a, b = instr.args
    return ((a, b), (left, right)), ((b, a), (right, left))


def _made_in_turn(lifter: Lifter, arg: Arg, matrix: Arg) -> bool:
    """Whether a value is computed in the turn of the loop that an expert's matrix is picked in."""
    made = lifter.instr(lifter.graph.behind(matrix, ("permute", "cast", "same", "reshape")))
    item = lifter.lift(made.args[1]) if made is not None and made.word in ("pick", "take") else None
    position = lifter.graph.position
    return isinstance(item, Anchor) and isinstance(arg, Ref) and position[arg.name] > position[item.name]


def _plain(held: Lift) -> bool:
    """Whether a value is no loop's rows: nothing is known of it, or it is a view of tokens."""
    return isinstance(held, NoMatch) or (isinstance(held, Rows) and held.space.kind in ("grid", "slots"))


def _tokens(lifter: Lifter, arg: Arg) -> Rows | None:
    """x[…, H] as it is."""
    kind = lifter.type(arg)
    if not isinstance(arg, Ref) or kind.rank < 2 or kind.dtype not in FLOATS:
        return None
    return Rows(Space(EVERY), Token(arg.name))


def _mul(lifter: Lifter, instr: Instr) -> Lift | None:
    """The rows of every token times a number that is zero for all but those that chose the loop's expert."""
    for arg, factor in (instr.args, instr.args[::-1]):
        rows = lifter.lift(arg)
        if not isinstance(rows, Rows) or rows.space.kind != EVERY or not isinstance(factor, Ref):
            continue
        if not _one_each(lifter, factor, arg):
            return None
        return _limited(lifter, rows, factor, lifter.lift(factor))
    return None


def _limited(lifter: Lifter, rows: Rows, factor: Ref, gate: Lift) -> Lift | None:
    """The rows where a factor is not zero for all but those that chose the loop's expert."""
    weight = Slot(gate.value if isinstance(gate, Masked) else factor.name)
    weighted = replace(rows, row=Apply("mul", (rows.row, weight)))
    if _plain(gate):  # a number of the token's own, which is its weight where it has one expert
        return weighted if rows.space.key and one_expert(lifter.graph, rows.choice) else None
    if isinstance(gate, Column):
        return _gated(lifter, rows, gate)
    if not isinstance(gate, Masked | OneHot) or gate.choice not in lifter.graph.types or not gate.anchor:
        return None
    one = one_expert(lifter.graph, gate.choice)
    if isinstance(gate, Masked):
        found = weighted if gate.summed or one else None
    else:
        axes = set(gate.axes) - ({"1", "s"} if one else {"1"})
        found = rows if axes == set(token_axes(lifter.graph, gate.choice)) else None
    if found is None or (rows.space.key and (rows.space.key, rows.choice) != (gate.anchor, gate.choice)):
        return None
    return replace(found, space=_space_of(lifter, gate.choice, gate.anchor), choice=gate.choice)


def _gated(lifter: Lifter, rows: Rows, gate: Column) -> Rows | None:
    """The rows times the loop's expert's gates, which limit them where they are zero for those that did not choose."""
    choice, unit = chosen_by(lifter, gate.value)
    gated = replace(rows, row=Apply("mul", (rows.row, Gate(gate.value))))
    if rows.space.key and rows.space.key != gate.key:
        return None
    if rows.space.key:
        return rows if unit and choice == rows.choice else gated
    if not choice:
        return gated
    return replace(rows if unit else gated, space=_space_of(lifter, choice, gate.key), choice=choice)


def _space_of(lifter: Lifter, choice: str, anchor: str) -> Space:
    """Every token, of which those that did not choose the loop's expert are zero."""
    return Space(EVERY, 0, anchor, order_of(choice_axes(lifter.graph, choice), token_axes(lifter.graph, choice)))


def _put(lifter: Lifter, instr: Instr) -> Lift | None:
    """The loop's rows put into zeros that its turn begins with."""
    base, source, *ids = instr.args
    rows, found = lifter.lift(source), [at for at in map(lifter.lift, ids) if isinstance(at, Ids)]
    if not isinstance(rows, Rows) or rows.space.kind != "loop" or len(found) != len(ids) or not found:
        return None
    if lifter.type(source).rank < 2:
        return None  # weights, a number a row
    first = found[0]
    whole = is_token(lifter.graph, first.choice, tuple(i.what for i in found)) and first.choice in lifter.graph.types
    same = all((i.space, i.layout, i.choice) == (rows.space, "flat", first.choice) for i in found)
    once = whole and names_once(lifter.graph, first.choice)
    if not once or not same or rows.layout != "flat" or instr.attr("accumulate") or instr.attr("dim") != 0:
        return None
    zeros = lifter.instr(base)
    if zeros is None or zeros.word != "full" or zeros.attr("value") != 0.0 or rows.choice not in ("", first.choice):
        return None
    return replace(rows, space=_space_of(lifter, first.choice, rows.space.key), choice=first.choice)


def _one_each(lifter: Lifter, number: Arg, rows: Arg) -> bool:
    """Whether there is one number for each row: g[…, 1] beside r[…, H]."""
    given, wide = lifter.type(number).shape, lifter.type(rows).shape
    return given == (*wide[:-1], 1)


def _index(lifter: Lifter, instr: Instr) -> Lift | None:
    """The rows of every token, at those that chose the loop's expert."""
    table, *ids = instr.args
    rows = lifter.lift(table)
    if not isinstance(rows, Rows) or rows.space.kind != EVERY:
        return None
    found = [at for at in map(lifter.lift, ids) if isinstance(at, Ids)]
    if not found or len(found) != len(ids) or instr.attr("dim") != 0:
        return None
    first = found[0]
    if any((i.space, i.choice) != (first.space, first.choice) for i in found):
        return None
    if not is_token(lifter.graph, first.choice, tuple(i.what for i in found)):
        return None
    if rows.space.key and (rows.space.key, rows.choice) != (first.space.key, first.choice):
        return None
    return replace(rows, space=first.space, layout=first.layout, choice=first.choice)


def _view(lifter: Lifter, instr: Instr) -> Lift | None:
    """Rows of every token stay as they are."""
    rows = lifter.lift(instr.args[0])
    if not isinstance(rows, Rows) or rows.space.kind != EVERY:
        return None
    return NoMatch("a loop's rows of every token are put in another shape", instr.results[0])


_FIRST: Mapping[str, First] = {
    "contract": lambda lifter, instr, which: _contract(lifter, instr),
    "mul": lambda lifter, instr, which: _mul(lifter, instr),
    "index": lambda lifter, instr, which: _index(lifter, instr),
    "index_put": lambda lifter, instr, which: _put(lifter, instr),
    "reshape": lambda lifter, instr, which: _view(lifter, instr),
    "permute": lambda lifter, instr, which: _view(lifter, instr),
}


def with_every(rules: Mapping[str, Rule]) -> Mapping[str, Rule]:
    """A table of row rules that knows loops whose experts run on every token."""
    return tried_first(rules, _FIRST)


def added_rows(lifter: Lifter, instr: Instr) -> tuple[Arg, Rows] | None:
    """What `y + r` is added to, and the rows of the loop's expert that r is; None where r is none."""
    for base, arg in (instr.args, instr.args[::-1]):
        rows = lifter.lift(arg) if isinstance(arg, Ref) and isinstance(base, Ref) else None
        if isinstance(rows, Rows) and rows.space.kind == EVERY and rows.space.key:
            alike = lifter.type(base).shape == lifter.type(arg).shape == instr.types[0].shape
            own = alike and turns_in(lifter.graph, instr.results[0], rows.space.key)
            return (base, replace(rows, space=replace(rows.space, kind="loop"))) if own else None
    return None
