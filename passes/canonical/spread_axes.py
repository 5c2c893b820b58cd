"""Axes along which nothing changes are left out: an expand before a pointwise function, a product with a column.

mul(expand(g[T, E, 1])[T, E, H], y[T, E, H])   →   mul(g, y)
y[T, H, E] · g[T, E, 1] → [T, H, 1]            →   reshape(y · reshape(g)[T, E])
"""

from __future__ import annotations

from moec.ir.graph import Arg, Instr, Ref, Type
from moec.passes.canonical.rewriter import Rewriter, again
from moec.passes.raising.word_contract import equation_of, normal_equation

_TWO = frozenset({"mul", "add", "sub", "div"})


def rule_expand(state: Rewriter, instr: Instr) -> Instr | None:
    """f(expand(a), b) where b alone makes the result as wide."""
    if instr.word not in _TWO or len(instr.args) != 2:
        return None
    for i, arg in enumerate(instr.args):
        wide, other = state.by(arg, "expand"), instr.args[1 - i]
        if wide is None or not isinstance(other, Ref) or state.by(other, "expand") is not None:
            continue
        if state.type(other).shape != instr.types[0].shape or state.type(other).rank < 3:
            continue
        narrow = state.type(wide.args[0])
        if narrow.rank != wide.types[0].rank or narrow.shape[-1] != 1 or wide.types[0].shape[-1] == 1:
            continue
        return again(instr, instr.word, (wide.args[0], other) if i == 0 else (other, wide.args[0]))
    return None


def rule_column(state: Rewriter, instr: Instr) -> Instr | None:
    """Rows of experts times a column of gates: without the axis of size 1, which comes back behind the product."""
    if instr.word != "contract":
        return None
    letters, out = equation_of(instr)
    for i, arg in enumerate(instr.args):
        mine, other, kind = letters[i], letters[1 - i], state.type(arg)
        last = mine[-1]
        if kind.rank < 3 or kind.shape[-1] != 1 or out[-1] != last or last in other or state.stored(instr.args[1 - i]):
            continue
        if len(other) != len(mine) or not _of_experts(state, instr.args[1 - i]):
            continue
        args: list[Arg] = list(instr.args)
        args[i] = state.reshape(arg, kind.shape[:-1])
        letters[i] = mine[:-1]
        to = Type(instr.types[0].dtype, instr.types[0].shape[:-1])
        narrow = state.emit("contract", args, to, eq=normal_equation(f"{','.join(letters)}->{out[:-1]}"))
        return again(instr, "reshape", (narrow,))
    return None


def _of_experts(state: Rewriter, arg: Arg) -> bool:
    """Whether a value is rows that were stacked, or seen in another order."""
    return state.by(arg, "stack", "permute") is not None
