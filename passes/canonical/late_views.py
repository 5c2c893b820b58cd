"""Views that split tokens' axes wait behind the sum over experts, and transposes of gates behind functions of a number.

reduce_sum(mul(reshape(r[E, T, H])[E, B, S, H], g[E, B, S, 1])) dims=(0,)   →   reshape(reduce_sum(mul(r, g[E, T, 1])))
sigmoid(permute(g[T, E]))                                                   →   permute(sigmoid(g))
"""

from __future__ import annotations

import sympy

from moec.ir.expr import POINTWISE
from moec.ir.graph import Arg, Dim, Instr, Ref, Type
from moec.passes.canonical.rewriter import Rewriter, again
from moec.passes.rows.hot import same

NEAR = 64
"""How many values behind a view are looked at for one of its shape."""


def rule_sum(state: Rewriter, instr: Instr) -> Instr | None:
    """A sum over one axis of rows times numbers, where another axis of the rows was split for it."""
    made = state.by(instr.args[0], "mul") if instr.word == "reduce_sum" and not instr.attr("keepdim") else None
    dims = instr.attr("dims") if made is not None else None
    if made is None or not isinstance(dims, tuple) or len(dims) != 1:
        return None
    gone, wide = int(str(dims[0])), made.types[0].shape
    for rows, numbers in (made.args, made.args[::-1]):
        view, given = state.by(rows, "reshape"), state.type(numbers).shape
        if view is None or state.type(rows).shape != wide or given != (*wide[:-1], 1):
            continue
        narrow = state.type(view.args[0])
        axes = _split(narrow.shape, wide)
        like = _of_shape(state, view, instr.types[0].shape)
        if axes is None or gone in range(*axes) or axes[1] == len(wide) or like is None:
            continue
        factor = state.reshape(state.behind(numbers, "reshape"), (*narrow.shape[:-1], sympy.S.One))
        product = state.emit("mul", (view.args[0], factor), Type(made.types[0].dtype, narrow.shape))
        at = gone if gone < axes[0] else gone - (len(wide) - narrow.rank)
        kind = Type(instr.types[0].dtype, (*narrow.shape[:at], *narrow.shape[at + 1 :]))
        total = state.emit("reduce_sum", (product,), kind, dims=(at,), keepdim=False)
        return again(instr, "reshape", (total, *like))
    return None


def _of_shape(state: Rewriter, start: Instr, shape: tuple[Dim, ...]) -> tuple[Arg, ...] | None:
    """What a view of several symbolic sizes is made by: a value of that shape whose own view `start` is made of.

    () where a view needs none; None where there is no such value near.
    """
    if sum(not dim.is_Integer for dim in shape) <= 1:
        return ()
    todo, seen = [start], set[str]()
    while todo and len(seen) < NEAR:
        made = todo.pop(0)
        seen.add(made.results[0])
        first = made.args[0] if made.args else None
        if made.word == "reshape" and isinstance(first, Ref) and state.type(first).shape == shape:
            return (first,)
        todo += [state.defs[name] for name in made.uses if name in state.defs and name not in seen]
    return None


def _split(source: tuple[Dim, ...], to: tuple[Dim, ...]) -> tuple[int, int] | None:
    """The axes of `to`, from one on and before another, that one of `source` was split into; others stay."""
    more = len(to) - len(source)
    if more < 1 or len(source) < 2:
        return None
    for i in range(len(source)):
        if _alike(source[:i], to[:i]) and _alike(source[i + 1 :], to[i + 1 + more :]):
            return (i, i + 1 + more) if same(source[i], sympy.Mul(*to[i : i + 1 + more])) else None
    return None


def _alike(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def rule_function(state: Rewriter, instr: Instr) -> Instr | None:
    """f(g.t()) of numbers that were scattered at each token's choice is f(g).t()."""
    if instr.word not in POINTWISE or POINTWISE[instr.word].arity != 1 or len(instr.args) != 1:
        return None
    turned = state.by(instr.args[0], "permute")
    if turned is None or turned.types[0].rank != 2 or state.by(turned.args[0], "scatter") is None:
        return None
    kind = Type(instr.types[0].dtype, state.type(turned.args[0]).shape)
    value: Arg = state.emit(instr.word, (turned.args[0],), kind, **dict(instr.attrs))
    return again(instr, "permute", (value,), dims=(1, 0))
