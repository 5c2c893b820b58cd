"""A product with a one-hot mask is an index, and so is a flat place worked out by hand.

one_hot(ids[T, k]) · W[E, N]                     →   index(W, ids)
Σ_e one_hot(ids)[t, k, e] · y[t, e, h]           →   gather(y, ids) along experts
index(reshape(y[T, E, H])[T·E, H], t·E + ids)    →   gather(y, ids) along experts
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from moec.ir.graph import Arg, Dim, Instr, Ref, Type
from moec.passes.canonical.bank_axes import experts_first
from moec.passes.canonical.rewriter import Rewriter, again
from moec.passes.canonical.split_axes import POINTS
from moec.passes.raising.word_contract import equation_of
from moec.passes.rows.hot import same


def rule_product(state: Rewriter, instr: Instr) -> Instr | None:
    """Σ over experts of a one-hot mask times a parameter, or times experts' rows."""
    if instr.word != "contract":
        return None
    letters, out = equation_of(instr)
    for i, arg in enumerate(instr.args):
        hot = state.by(state.behind(arg, "cast", "same"), "one_hot")
        if hot is None or not isinstance(hot.args[0], Ref):
            continue
        mine, other, table = letters[i], letters[1 - i], instr.args[1 - i]
        if mine[-1] in out or mine[-1] not in other:
            continue
        if state.type(table).dtype != instr.types[0].dtype:
            continue
        if set(mine) & set(other) == {mine[-1]} and state.stored(table):
            return _index(state, instr, table, hot.args[0], (mine, other, out))
        return _gather(state, instr, table, hot.args[0], (mine, other, out))
    return None


def _index(state: Rewriter, instr: Instr, table: Arg, ids: Ref, letters: tuple[str, str, str]) -> Instr:
    """index(W, ids) with axes in the order of the product's."""
    mine, other, out = letters
    rest = other.replace(mine[-1], "")
    order = [other.index(c) for c in mine[-1] + rest]
    first = table if order[0] == 0 else experts_first(state, table, order)
    have, kind = mine[:-1] + rest, instr.types[0]
    if have == out:
        return again(instr, "index", (first, ids), dim=0)
    shape = tuple(kind.shape[out.index(c)] for c in have)
    rows = state.emit("index", (first, ids), Type(kind.dtype, shape), dim=0)
    return again(instr, "permute", (rows,), dims=tuple(have.index(c) for c in out))


def _gather(state: Rewriter, instr: Instr, rows: Arg, ids: Ref, letters: tuple[str, str, str]) -> Instr | None:
    """gather(y, ids) where y's axes are the tokens', the experts', then features."""
    mine, other, out = letters
    lead = other[: other.index(mine[-1])]
    rest, slots = other[len(lead) + 1 :], mine[len(lead) : -1]
    if not lead or not rest or mine[: len(lead)] != lead or len(slots) > 1 or out != lead + slots + rest:
        return None
    if state.by(rows, *POINTS, "contract", "stack", "reshape", "permute") is None:
        return None
    return gathered(state, instr, rows, ids, len(lead), tuple(state.type(rows).shape[len(lead) + 1 :]))


def gathered(state: Rewriter, instr: Instr, rows: Arg, ids: Arg, dim: int, rest: Sequence[Dim]) -> Instr:
    """gather(rows, ids) along `dim`; ids[tokens…] or ids[tokens…, k]."""
    kind, to = state.type(ids), instr.types[0]
    lead = kind.shape if kind.rank > dim else (*kind.shape, sympy.S.One)
    narrow = state.reshape(ids, (*lead, *(sympy.S.One for _ in rest)))
    wide = state.emit("expand", (narrow,), Type(kind.dtype, (*lead, *rest)))
    if to.shape == (*lead, *rest):
        return again(instr, "gather", (rows, wide), dim=dim)
    made = state.emit("gather", (rows, wide), Type(to.dtype, (*lead, *rest)), dim=dim)
    return again(instr, "reshape", (made,))


def rule_place(state: Rewriter, instr: Instr) -> Instr | None:
    """Rows of all experts and tokens in one axis, indexed at t·E + e, or at e·T + t."""
    if instr.word != "index" or len(instr.args) != 2 or instr.attr("dim") != 0:
        return None
    place = state.by(state.behind(instr.args[1], "reshape"), "add")
    if place is None or state.type(instr.args[0]).rank != 2:
        return None
    for base, ids in (place.args, place.args[::-1]):
        tokens, by_token = _times(state, base)
        chosen, by_expert = _times(state, ids)
        counted = state.by(state.behind(tokens, "reshape", "expand", "cast", "same"), "arange")
        if counted is None or not isinstance(chosen, Ref) or state.type(chosen).dtype not in ("i64", "i32"):
            continue
        found = _experts(state, instr.args[0], counted.types[0].shape[0], by_token, by_expert)
        ok = state.type(chosen).shape == place.types[0].shape and state.type(chosen).rank == 2
        if found is None or not ok or state.type(tokens).shape[-2:] not in _columns(place.types[0]):
            continue
        return gathered(state, instr, found, chosen, 1, state.type(found).shape[2:])
    return None


def _columns(kind: Type) -> tuple[tuple[Dim, ...], ...]:
    """The shapes of numbers that differ by token alone."""
    return ((kind.shape[0], sympy.S.One), kind.shape)


def _times(state: Rewriter, arg: Arg) -> tuple[Arg, Arg]:
    """(value, factor) of value · factor; the factor is 1 where there is none."""
    seen = state.behind(arg, "reshape", "expand")
    made = state.by(seen, "mul")
    if made is None:
        return arg, 1
    numbers = [a for a in made.args if state.type(a).dtype == "any"]
    values = [a for a in made.args if state.type(a).dtype != "any"]
    if len(numbers) != 1 or len(values) != 1:
        return arg, 1
    return (values[0] if seen is arg else arg), numbers[0]


def _experts(state: Rewriter, arg: Arg, tokens: Dim, by_token: Arg, by_expert: Arg) -> Arg | None:
    """y[T, E, H] behind its flat form, by the steps from token to token and from expert to expert."""
    joined, stacked = state.by(arg, "reshape"), state.by(arg, "cat")
    if joined is not None and state.type(joined.args[0]).rank == 3:
        rows, shape = joined.args[0], state.type(joined.args[0]).shape
        if same(shape[0], tokens) and _is(by_token, shape[1]) and by_expert == 1:
            return rows
        if same(shape[1], tokens) and _is(by_expert, shape[1]) and by_token == 1:
            return state.permute(rows, (1, 0, 2))
    parts = stacked.args[0] if stacked is not None and stacked.attr("dim") == 0 else ()
    if not isinstance(parts, tuple) or not parts or by_token != 1 or not _is(by_expert, tokens):
        return None
    kinds = {state.type(part) for part in parts}
    if len(kinds) != 1 or not same(next(iter(kinds)).shape[0], tokens):
        return None
    kind = kinds.pop()
    count = sympy.Integer(len(parts))
    return state.emit("stack", (parts,), Type(kind.dtype, (kind.shape[0], count, *kind.shape[1:])), dim=1)


def _is(factor: Arg, size: Dim) -> bool:
    """Whether a number, a symbolic size that is an input of its name, or the text of one, is that size."""
    return str(factor).removeprefix("%") == str(size)
