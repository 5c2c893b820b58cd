"""Expert choice: each expert takes the tokens that score best with it; its rows run as one group of the same op.

%xe = index(%x, %ids[E, C]); %y = batched experts of %xe   →   %y = experts(%xe as [E·C, H], 1, the expert of each row)

What sends the rows back to their tokens stays as the model has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from moec.ir.dims import dim_text
from moec.ir.dtypes import DTYPES
from moec.ir.graph import Arg, Instr, Ref, Type
from moec.ir.match import NoMatch
from moec.passes.grid.rows import Grid, on_grid, parameter
from moec.passes.raising.word_contract import equation_of
from moec.passes.rows.body import BodyMatch, match_body
from moec.passes.rows.hot import letters_of
from moec.passes.rows.lift import Lift, Lifter, same
from moec.passes.rows.pairs import Writer
from moec.passes.rows.rows import Dot, Expert, Rows, Token
from moec.passes.rows.say_experts import say_experts

PICKED = "picked"
"""The key of the grid of picked rows."""


@dataclass(frozen=True)
class Picked:
    """Rows xe[…, E, …, C, H] of the tokens that a top-k picked for each expert.

    experts  the position of the experts' axis      at  when not −1: of that expert alone, its axis of size 1 or gone
    """

    rows: str
    experts: int
    at: int = -1

    def axes(self, rank: int) -> tuple[str, ...]:
        """The labels of the leading axes of all rows: `e`, `c` the last of the others, and one for each further one."""
        others = [i for i in range(rank - 1) if i != self.experts]
        names = dict(zip(others, (*letters_of(len(others) - 1), "c"), strict=True))
        return tuple(names.get(i, "e") for i in range(rank - 1))


def picked(lifter: Lifter, arg: Arg, batch: int) -> Picked | None:
    """Whether a value is rows of tokens that experts picked; `batch`: the axis that is multiplied expert by expert."""
    made = lifter.instr(arg)
    if batch >= 0:
        return Picked(arg.name, batch) if isinstance(arg, Ref) and _of_tops(lifter, arg, batch) else None
    if made is not None and made.word == "reshape":
        made = lifter.instr(made.args[0])
    if made is None or made.word != "slice" or not isinstance(made.args[0], Ref):
        return None
    dim, start, stop = (int(str(made.attr(n))) for n in ("dim", "start", "stop"))
    kind, mine = lifter.type(made.args[0]), lifter.type(arg)
    alone = (*kind.shape[:dim], *kind.shape[dim + 1 :])
    if stop != start + 1 or mine.shape not in (made.types[0].shape, alone):
        return None
    return Picked(made.args[0].name, dim, start) if _of_tops(lifter, made.args[0], dim) else None


_GATHERS = frozenset(
    {
        "reshape",
        "permute",
        "cast",
        "same",
        "expand",
        "repeat",
        "index",
        "gather",
        "contract",
        "one_hot",
        "add",
        "opaque",
    }
)
"""Words between a top-k's places and the rows that are taken there: which rows they are does not matter."""


def _of_tops(lifter: Lifter, rows: Ref, experts: int) -> bool:
    """Whether rows[…, E, …, H] are taken by the places of a top-k that each expert has of its own."""
    kind = lifter.type(rows)
    if kind.rank not in (3, 4) or experts >= kind.rank - 1:
        return False
    pending, seen = [(rows, 0)], {rows}
    while pending:
        value, depth = pending.pop()
        made = lifter.instr(value)
        if made is None or depth > 12:
            continue
        if made.word == "topk":
            scores, dim = lifter.type(made.args[0]), made.attr("dim")
            apart = [d for i, d in enumerate(made.types[1].shape) if i != dim]
            if kind.shape[experts] in apart and same(sympy.Mul(*made.types[1].shape), sympy.Mul(*kind.shape[:-1])):
                return scores.rank == kind.rank - 1
        elif made.word in _GATHERS:
            fresh = [Ref(name) for name in made.uses if Ref(name) not in seen]
            seen.update(fresh)
            pending += [(ref, depth + 1) for ref in fresh]
    return False


def rule_contract(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Picked rows times their expert's matrix: the first product of an expert."""
    (left, right), out = equation_of(instr)
    for x, w, row, mat in ((*instr.args, left, right), (*instr.args[::-1], right, left)):
        stacked = len(mat) == 3 and mat[0] in row[:-1] and mat[1:].count(row[-1]) == 1
        if not isinstance(w, Ref) or not (stacked or len(mat) == 2):
            continue
        if row[-1] not in mat or row[:-1] != out[:-1] or row[-1] in out:
            continue
        found = picked(lifter, x, row.index(mat[0]) if stacked else -1)
        if found is None:
            continue
        rows = _first_product(lifter, (found, x), w, mat.index(row[-1]) - stacked)
        if rows is not None:
            return rows
    return NoMatch(f"contraction {instr.attr('eq')} is not of picked tokens", instr.results[0])


def _first_product(lifter: Lifter, given: tuple[Picked, Arg], w: Ref, axis: int) -> Rows | None:
    """Picked rows x · W[e], contracting an axis of the expert's matrix."""
    found, x = given
    kind = lifter.graph.types[found.rows]
    axes = found.axes(kind.rank)
    sizes = tuple(zip(axes, kind.shape, strict=False))
    grid = Grid("grid", found.at + 1, f"{PICKED}:{found.rows}:{'.'.join(axes)}", sizes=sizes)
    if found.at < 0:
        weight: Expert | NoMatch = Expert((w.name,), (0, 1), True)
        if not same(lifter.type(w).shape[0], kind.shape[found.experts]):
            return None
    else:
        weight = parameter(lifter, w, 2)
        unit = lifter.type(x).rank == kind.rank
        axes = tuple("1" if a == "e" else a for a in axes if unit or a != "e")
    if isinstance(weight, NoMatch):
        return None
    return Rows(grid, Dot(Token(found.rows), weight, axis), ".".join(axes))


def match_picked(lifter: Lifter, instr: Instr) -> BodyMatch | NoMatch:
    """The expert whose output on picked rows `instr` is, when no later instruction is more of it."""
    body = _body(lifter, instr)
    if isinstance(body, NoMatch):
        return body
    for user in lifter.graph.users.get(instr.results[0], ()):
        if user.word in ("add", "reshape", "permute") and not isinstance(_body(lifter, user), NoMatch):
            return NoMatch("part of an expert on picked rows")
    return body


def _body(lifter: Lifter, instr: Instr) -> BodyMatch | NoMatch:
    rows = lifter.lift(Ref(instr.results[0]))
    if not isinstance(rows, Rows) or not on_grid(rows) or not isinstance(rows.space, Grid):
        return NoMatch("not picked rows")
    if not rows.space.key.startswith(f"{PICKED}:") or rows.space.key.rpartition(":")[2] != rows.layout:
        return NoMatch("not picked rows")
    body = match_body(lifter.graph, rows.row)
    if isinstance(body, NoMatch):
        return body
    if body.weight or dict(rows.space.sizes)["e"] != body.num_experts or not body.width.is_Integer:
        return NoMatch("picked rows of other experts", depth=2)
    if not body.spec.out:
        return NoMatch("one product of picked rows, which no kernel does better", depth=2)
    return body


def say_picked(lifter: Lifter, root: Instr, body: BodyMatch) -> tuple[Instr, ...] | NoMatch:
    """The instructions that replace `root`."""
    graph, held = lifter.graph, lifter.lift_result(root)
    if not isinstance(held, Rows):
        return NoMatch("not picked rows", root.results[0])
    out = Writer(graph, root)
    to, rows = root.types[0], graph.types[body.token]
    if to.shape != (*rows.shape[:-1], body.out) or rows.dtype not in DTYPES or to.dtype not in DTYPES:
        return NoMatch(f"rows are {rows}, experts' outputs {to}", root.results[0], 7)
    count = sympy.Mul(*rows.shape[:-1])
    axes = held.layout.split(".")
    ones = out.emit("ones_of_rows", (Ref(body.token),), Type(rows.dtype, (count, sympy.S.One)))
    kind = Type("i64", (count, sympy.S.One))
    ids = out.emit("expert_of_rows", (Ref(body.token),), kind, dim=axes.index("e"))
    capacity = ("capacity", dim_text(rows.shape[axes.index("c")]))
    return say_experts(out, body, ones, ids, "expert_choice", capacity, ("order", "score"), ("drop", "never"))
