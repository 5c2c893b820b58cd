"""Gate and up that a parameter keeps apart on an axis of their own are the halves of one matrix: [E, 2, F, H].

contract(x, reshape(slice(take(W[E, 2, F, H], e)) of the first))  →  slice(contract(x, take(reshape(W)[E, 2·F, H], e)))
contract(x, index(W[E, 2, F, H], ids))[…, 2, F]  →  reshape(contract(x, index(reshape(W)[E, 2·F, H], ids)))
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moec.ir.graph import Arg, Dim, Instr, Ref, Type
from moec.passes.canonical import split_axes
from moec.passes.canonical.rewriter import Rewriter, again
from moec.passes.raising.word_contract import equation_of, normal_equation


@dataclass(frozen=True)
class Bank:
    """A parameter [E, …, 2, F, …], or experts' own matrices of it; the axis of 2 is `axis` in these, `at` in it."""

    parameter: Arg
    taken: Instr | None
    axis: int
    at: int


def rule_cut(state: Rewriter, instr: Instr) -> Instr | None:
    """A product with one of the two matrices is a half of the product with both."""
    if instr.word != "contract":
        return None
    letters, out = equation_of(instr)
    for i, arg in enumerate(instr.args):
        seen = state.by(arg, "reshape")
        cut = None if seen is None else state.by(seen.args[0], "slice")
        if seen is None or cut is None or cut.attr("step") != 1 or not isinstance(cut.attr("dim"), int):
            continue
        axis, start, stop = (int(str(cut.attr(n))) for n in ("dim", "start", "stop"))
        bank = _bank(state, cut.args[0], axis)
        shape = cut.types[0].shape
        if bank is None or stop != start + 1 or seen.types[0].shape != (*shape[:axis], *shape[axis + 1 :]):
            continue
        letter = letters[i][axis]
        if letter not in out or letter in letters[1 - i]:
            continue
        width, place = shape[axis + 1], out.index(letter)
        args = list(instr.args)
        args[i] = _joined(state, bank)
        whole = _with(instr.types[0], place, 2 * width)
        product = state.emit("contract", args, whole, eq=str(instr.attr("eq")))
        bounds = {"dim": place, "start": start * int(width), "stop": stop * int(width), "step": 1}
        return again(instr, "slice", (product,), **bounds)
    return None


def rule_both(state: Rewriter, instr: Instr) -> Instr | None:
    """A product with both matrices at once, their axis apart, is one with the matrix that holds both."""
    if instr.word != "contract":
        return None
    letters, out = equation_of(instr)
    for i, arg in enumerate(instr.args):
        for axis in range(state.type(arg).rank - 1):
            bank = _bank(state, arg, axis)
            two, own = letters[i][axis], letters[i][axis + 1]
            if bank is None or any(c not in out or c in letters[1 - i] for c in (two, own)):
                continue
            args, width = list(instr.args), state.type(arg).shape[axis + 1]
            args[i] = _joined(state, bank)
            letters[i] = letters[i].replace(two, "")
            left, kind = out.replace(two, ""), instr.types[0]
            place = left.index(own)
            sizes = dict(zip(out, kind.shape, strict=True))
            whole = replace(kind, shape=tuple(2 * width if c == own else sizes[c] for c in left))
            eq = normal_equation(f"{','.join(letters)}->{left}")
            product = state.emit("contract", args, whole, eq=eq)
            apart = f"{left[:place]}{two}{left[place:]}"
            if apart == out:
                return again(instr, "reshape", (product,))
            made = state.reshape(product, tuple(sizes[c] for c in apart))
            return again(instr, "permute", (made,), dims=tuple(apart.index(c) for c in out))
    return None


def rule_turned(state: Rewriter, instr: Instr) -> Instr | None:
    """slice(permute(reshape(u))) of one of the two: the axis of two is cut where it was made."""
    turned = state.by(instr.args[0], "permute") if instr.word == "slice" else None
    made = None if turned is None else state.by(turned.args[0], "reshape")
    if turned is None or made is None or state.by(made.args[0], "contract") is None:
        return None
    dims, dim = turned.numbers("dims"), int(str(instr.attr("dim")))
    if made.types[0].shape[dims[dim]] != 2 or instr.types[0].shape[dim] != 1:
        return None
    kind = _with(made.types[0], dims[dim], instr.types[0].shape[dim])
    attrs = {**dict(instr.attrs), "dim": dims[dim]}
    cut = split_axes.rule_half(
        state, Instr((instr.results[0],), "slice", (turned.args[0],), (kind,), tuple(attrs.items()))
    )
    if cut is None:
        return None
    return again(instr, "permute", (state.emit(cut.word, cut.args, kind, **dict(cut.attrs)),), dims=dims)


def _bank(state: Rewriter, arg: Arg, axis: int) -> Bank | None:
    """The parameter behind a value whose `axis` is one of two matrices."""
    taken = state.by(arg, "take", "index")
    parameter = arg if taken is None else taken.args[0]
    if not state.stored(parameter) or state.type(parameter).rank != 4:
        return None
    if taken is not None and (len(taken.args) != 2 or dict(taken.attrs).get("dim", 0) != 0):
        return None
    at = axis - (state.type(arg).rank - 4)
    shape = state.type(parameter).shape
    if not 1 <= at < 3 or shape[at] != 2 or not all(d.is_Integer for d in shape):
        return None
    return Bank(parameter, taken, axis, at)


def _joined(state: Rewriter, bank: Bank) -> Ref:
    """The same matrices with both in one."""
    whole = state.reshape(bank.parameter, _merged(state.type(bank.parameter).shape, bank.at))
    if bank.taken is None:
        assert isinstance(whole, Ref)
        return whole
    kind = bank.taken.types[0]
    made = replace(kind, shape=_merged(kind.shape, bank.axis))
    return state.emit(bank.taken.word, (whole, *bank.taken.args[1:]), made, **dict(bank.taken.attrs))


def _merged(shape: tuple[Dim, ...], axis: int) -> tuple[Dim, ...]:
    return (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def _with(kind: Type, axis: int, size: Dim) -> Type:
    return replace(kind, shape=(*kind.shape[:axis], size, *kind.shape[axis + 1 :]))
