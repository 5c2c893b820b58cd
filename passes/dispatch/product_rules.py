"""The row rules of products: rows times the matrix of their expert."""

from __future__ import annotations

from dataclasses import replace

from moec.ir.graph import Arg, Instr, Ref, Type
from moec.ir.match import NoMatch
from moec.passes.raising.word_contract import equation_of
from moec.passes.rows.lift import Lift, Lifter
from moec.passes.rows.rows import (
    Dot,
    Expert,
    PerExpert,
    Rows,
    Token,
    compatible,
    merged,
)


def weight_of(lifter: Lifter, arg: Arg) -> Expert | NoMatch:
    """A stacked [E, a, b] parameter used as a batch of experts' matrices, its last axes perhaps swapped."""
    order = (0, 1)
    made = lifter.instr(arg)
    while made is not None and made.word == "permute" and made.attr("dims") == (0, 2, 1):
        order, arg = (order[1], order[0]), made.args[0]
        made = lifter.instr(arg)
    if not isinstance(arg, Ref) or lifter.type(arg).rank != 3:
        return NoMatch(f"{lifter.type(arg)} is not a stack of matrices", str(arg))
    return Expert((arg.name,), order, True)


def rule_grouped(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Rows in expert order times each group's matrix."""
    rows, weight, offsets = lifter.lift(instr.args[0]), weight_of(lifter, instr.args[1]), lifter.lift(instr.args[2])
    if isinstance(rows, NoMatch):
        return rows
    if isinstance(weight, NoMatch):
        return weight
    if not isinstance(rows, Rows) or rows.space.kind != "sorted":
        return NoMatch("grouped product of rows that are not in expert order", instr.results[0])
    if not isinstance(offsets, PerExpert) or offsets.what != "offsets":
        return (
            offsets
            if isinstance(offsets, NoMatch)
            else NoMatch("group ends are not the running count of rows", instr.results[0])
        )
    if rows.choice and rows.choice != offsets.choice:
        return NoMatch("groups and rows come from different choices", instr.results[0])
    return replace(rows, row=Dot(rows.row, weight, 0), choice=offsets.choice)


def rule_contract(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Rows times their expert's matrix: in a loop, gathered a row, or batched over all experts."""
    (left, right), out = equation_of(instr)
    x, w = instr.args
    a, b = lifter.lift(x), lifter.lift(w)
    if _matrix(a) and not _matrix(b):
        x, w, a, b, left, right = w, x, b, a, right, left
    if isinstance(a, Rows) and a.space.kind == "dense" and a.layout == "et" and isinstance(b, NoMatch):
        b = weight_of(lifter, w)
        if isinstance(b, Expert) and left[0] == right[0] == out[0]:
            right = right[1:]
    if (
        (
            isinstance(b, Rows)
            and isinstance(b.row, Expert)
            and isinstance(a, NoMatch)
            and isinstance(x, Ref)
            and b.layout == "tk"
        )
        and left[0] == right[0]
        and lifter.type(x).rank == 2
    ):
        a = Rows(b.space, Token(x.name), "tk", b.choice)
        left = left[0] + right[1] + left[1:]
    if not isinstance(a, Rows):
        return a if isinstance(a, NoMatch) else NoMatch(f"`contract` of {type(a).__name__}", instr.results[0])
    return _dot(lifter, instr, a, b, (left, right, out), (x, w))


def _last(letters: str, letter: str, kind: Type) -> bool:
    """Whether an axis is the last one but for axes of size 1."""
    behind = letters[letters.index(letter) + 1 :]
    return not behind or (kind.rank == len(letters) and all(size == 1 for size in kind.shape[-len(behind) :]))


def _matrix(value: Lift) -> bool:
    return isinstance(value, Expert) or (isinstance(value, Rows) and isinstance(value.row, Expert))


def _dot(lifter: Lifter, instr: Instr, a: Rows, b: Lift, letters: tuple[str, str, str], args: tuple[Arg, Arg]) -> Lift:
    left, right, out = letters
    weight: Expert
    if isinstance(b, Rows) and isinstance(b.row, Expert) and compatible(a.space, b.space) and a.layout == b.layout:
        if left[: a.lead] != right[: b.lead]:
            return NoMatch("rows and gathered matrices run over different axes", instr.results[0])
        if a.choice and b.choice and a.choice != b.choice:
            return NoMatch("an expert's matrices are gathered by different choices", instr.results[0])
        weight, right, a = b.row, right[b.lead :], merged(a, b)
    elif isinstance(b, Expert):
        weight = b
    else:
        return b if isinstance(b, NoMatch) else NoMatch(f"rows times {type(b).__name__}", instr.results[0])
    shared = [c for c in left if c in right and c not in out]
    if len(right) != 2 or len(weight.order) != 2 or len(shared) != 1:
        return NoMatch(f"contraction {instr.attr('eq')} is not one row times one matrix", instr.results[0])
    if not out.startswith(left[: a.lead]):
        return NoMatch(f"contraction {instr.attr('eq')} moves the row axis", instr.results[0])
    if not _last(left, shared[0], lifter.type(args[0])) or not _last(out, right.strip(shared[0]), instr.types[0]):
        return NoMatch(f"contraction {instr.attr('eq')} is over another axis than features", instr.results[0])
    return replace(a, row=Dot(a.row, weight, right.index(shared[0])))
