"""Expert choice: each expert takes the tokens that score best with it; its rows run as one group of the same op.

%xe = index(%x, %ids[E, C]); %y = batched experts of %xe   →   %y = experts(%xe as [E·C, H], 1, the expert of each row)

What sends the rows back to their tokens stays as the model has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from moec.dims import dim_text
from moec.graph import Arg, Dim, Graph, Instr, Ref, Type
from moec.match import NoMatch
from moec.passes.body import BodyMatch, match_body
from moec.passes.grid import Grid, labels, on_grid, parameter, params_of
from moec.passes.lift import Lift, Lifter, same
from moec.passes.pairs import Writer
from moec.passes.rows import Dot, Expert, Rows, Token
from moec.spec import DTYPES, KernelSpec

PICKED = "picked"
"""The key of the grid of picked rows."""


@dataclass(frozen=True)
class Picked:
    """Rows xe[E, C, H] of the tokens that a top-k picked for each expert; `at`: those of one expert alone."""

    rows: str
    at: int = -1


def picked(lifter: Lifter, arg: Arg) -> Picked | None:
    """Whether a value is tokens gathered by each expert's own top-k over tokens."""
    made = lifter.instr(arg)
    at = -1
    if made is not None and lifter.type(arg).rank == 2 and made.word == "reshape":
        made = lifter.instr(made.args[0])
    if made is not None and made.word == "slice" and made.attr("dim") == 0:
        start, stop = int(str(made.attr("start"))), int(str(made.attr("stop")))
        if stop != start + 1:
            return None
        at, arg = start, made.args[0]
        made = lifter.instr(arg)
    if made is None or not isinstance(arg, Ref) or lifter.type(arg).rank != 3:
        return None
    ids, tokens = _gathered(lifter, made)
    if ids is None or not _tops(lifter, ids, tokens):
        return None
    return Picked(arg.name, at)


def _gathered(lifter: Lifter, made: Instr) -> tuple[Arg | None, Dim]:
    """The ids[E, C] of x[ids], or of einsum("ect,th->ech", one_hot(ids), x), and the number of tokens."""
    none = (None, sympy.S.Zero)
    if made.word == "reshape":  # x[ids.reshape(-1)].reshape(E, C, H)
        inner = lifter.instr(made.args[0])
        flat = lifter.instr(inner.args[1]) if inner is not None and inner.word == "index" else None
        if inner is None or flat is None or flat.word != "reshape" or len(inner.args) != 2 or inner.attr("dim") != 0:
            return none
        if lifter.type(flat.args[0]).shape != made.types[0].shape[:2]:
            return none
        return flat.args[0], lifter.type(inner.args[0]).shape[0]
    if made.word == "index" and len(made.args) == 2 and made.attr("dim") == 0 and lifter.type(made.args[0]).rank == 2:
        return made.args[1], lifter.type(made.args[0]).shape[0]
    if made.word != "contract" or made.attr("eq") not in ("abc,cd->abd",):
        return none
    hot = lifter.instr(made.args[0])
    while hot is not None and hot.word in ("cast", "same"):
        hot = lifter.instr(hot.args[0])
    return (hot.args[0], lifter.type(made.args[1]).shape[0]) if hot is not None and hot.word == "one_hot" else none


def _tops(lifter: Lifter, ids: Arg, tokens: Dim) -> bool:
    """Whether ids[E, C] are the places of a top-k over `tokens` scores of each expert."""
    made, swapped = lifter.instr(ids), False
    if made is not None and made.word == "permute" and made.attr("dims") == (1, 0):
        made, swapped = lifter.instr(made.args[0]), True
    if made is None or made.word != "topk":
        return False
    scores = lifter.type(made.args[0])
    dim = 0 if swapped else 1
    return scores.rank == 2 and made.attr("dim") == dim and same(scores.shape[dim], tokens)


def rule_contract(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Picked rows times their expert's matrix: the first product of an expert."""
    letters, out = str(instr.attr("eq")).split("->")
    left, right = letters.split(",")
    for x, w, row, mat in ((*instr.args, left, right), (*instr.args[::-1], right, left)):
        found = picked(lifter, x)
        if found is None or not isinstance(w, Ref):
            continue
        experts, seats = lifter.graph.types[found.rows].shape[:2]
        grid = Grid("grid", found.at + 1, f"{PICKED}:{found.rows}", sizes=(("e", experts), ("c", seats)))
        if found.at < 0 and len(mat) == 3 and row[0] == mat[0] == out[0] and same(lifter.type(w).shape[0], experts):
            weight: Expert | NoMatch = Expert((w.name,), (0, 1), True)
            mat, layout = mat[1:], "e.c"
        elif found.at >= 0 and len(mat) == 2:
            weight, layout = parameter(lifter, w, 2), ".".join(("1", "c")[3 - len(row) :])
        else:
            continue
        if isinstance(weight, NoMatch) or row[-1] not in mat or row[:-1] != out[:-1] or row[-1] in out:
            continue
        return Rows(grid, Dot(Token(found.rows), weight, mat.index(row[-1])), layout)
    return NoMatch(f"contraction {instr.attr('eq')} is not of picked tokens", instr.results[0])


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
    if not rows.space.key.startswith(PICKED) or labels(rows) != ("e", "c"):
        return NoMatch("not picked rows")
    body = match_body(lifter.graph, rows.row)
    if isinstance(body, NoMatch):
        return body
    if body.weight or dict(rows.space.sizes)["e"] != body.num_experts or not body.width.is_Integer:
        return NoMatch("picked rows of other experts", depth=2)
    return body


def say_picked(graph: Graph, root: Instr, body: BodyMatch) -> tuple[Instr, ...] | NoMatch:
    """The instructions that replace `root`."""
    out = Writer(graph, root)
    to, rows = root.types[0], graph.types[body.token]
    if to.shape != rows.shape or rows.dtype not in DTYPES or to.dtype not in DTYPES:
        return NoMatch(f"rows are {rows}, experts' outputs {to}", root.results[0], 7)
    count = rows.shape[0] * rows.shape[1]
    params = params_of(out, body)
    x = out.reshape(body.token, (count, rows.shape[2]))
    ones = out.emit("ones_of_rows", (Ref(body.token),), Type(rows.dtype, (count, sympy.S.One)))
    ids = out.emit("expert_of_rows", (Ref(body.token),), Type("i64", (count, sympy.S.One)))
    attrs = (
        ("spec", str(KernelSpec(body.spec, None, to.dtype))),
        ("form", "expert_choice"),
        ("experts", int(body.num_experts)),
        ("width", int(body.width)),
        ("capacity", dim_text(rows.shape[1])),
        ("order", "score"),
        ("drop", "never"),
    )
    name = root.results[0]
    kind = Type(to.dtype, (count, rows.shape[2]))
    made = Instr((f"{name}.rows",), "experts", (Ref(x), Ref(ones), Ref(ids), params), (kind,), attrs, root.loc)
    back = Instr((name,), "reshape", (Ref(f"{name}.rows"), Ref(body.token)), (to,), (), root.loc)
    return (*out.instrs, made, back)
