"""An axis that is split or joined beside a product is split in the product's matrix.

reshape(relu(x[T, H] · W[H, E·F] + b[E·F]))[T, E, F]   →   relu(x · reshape(W)[H, E, F] + reshape(b)[E, F])
reshape(h[T, E, F])[T, E·F] · W[E·F, H]                →   h · reshape(W)[E, F, H], summed over both
reshape(cat of [T, H], E of them)[T, E, H]             →   stack of them
slice(reshape(u[T, 2·F])[T, 2, F]) of the first half   →   slice(u) of its first half
reshape(index(W[E, H·F], ids))[T, k, H, F]             →   index(reshape(W)[E, H, F], ids)
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from moec.ir.expr import POINTWISE
from moec.ir.graph import Arg, Dim, Instr, Ref, Type
from moec.passes.canonical.rewriter import Rewriter, again
from moec.passes.raising.word_contract import equation_of, normal_equation
from moec.passes.rows.hot import same

POINTS = frozenset(POINTWISE) | {"cast", "same", "detach", "clamp_min", "clamp_max", "where", "masked_fill", "invert"}
"""Words whose result at a place is made of their operands at that place."""


@dataclass(frozen=True)
class Split:
    """Axis `axis` of a shape is `sizes` in the other, outermost first; the other axes are the same."""

    axis: int
    sizes: tuple[Dim, Dim]


def split_of(source: tuple[Dim, ...], to: tuple[Dim, ...]) -> Split | None:
    """How a reshape splits one axis in two, where that is all it does."""
    if len(to) != len(source) + 1:
        return None
    axis = next((i for i, (a, b) in enumerate(zip(source, to, strict=False)) if a != b), len(source) - 1)
    sizes = (to[axis], to[axis + 1])
    whole = source[:axis] == to[:axis] and source[axis + 1 :] == to[axis + 2 :] and source[axis] == sizes[0] * sizes[1]
    return Split(axis, sizes) if whole and all(d.is_Integer and d > 1 for d in sizes) else None


def rule_reshape(state: Rewriter, instr: Instr) -> Instr | Ref | None:
    """reshape(…) that splits an axis which a matrix, or a list of parts, made."""
    if instr.word != "reshape" or len(instr.args) != 1:
        return None
    source = state.undone(instr.args[0], instr.types[0].shape)
    if source is not None:
        return source
    how = split_of(state.type(instr.args[0]).shape, instr.types[0].shape)
    if how is None or _only_cut(state, instr, how) or not _all_split(state, instr):
        return None
    if not made_in_parts(state, instr.args[0], how):
        return None
    said = _split(state, instr.args[0], how)
    return said if isinstance(said, Ref) else None


def _all_split(state: Rewriter, instr: Instr) -> bool:
    """Whether nobody reads the value unsplit, as a router does that looks at its scores in groups and as they are."""
    value = instr.args[0]
    users = state.graph.users.get(value.name, ()) if isinstance(value, Ref) else ()
    return all(user.word == "reshape" and user.types[0].shape == instr.types[0].shape for user in users)


def _only_cut(state: Rewriter, instr: Instr, how: Split) -> bool:
    """Whether one of the two axes is only there to take it apart again, as the halves of a gated product."""
    users = state.graph.users.get(instr.results[0], ())
    return bool(users) and all(u.word == "slice" and u.attr("dim") in (how.axis, how.axis + 1) for u in users)


def made_in_parts(state: Rewriter, arg: Arg, how: Split, depth: int = 24) -> bool:
    """Whether an axis was made by a parameter's own axis, or by parts that were put side by side."""
    made = state.by(arg, *POINTS, "contract", "cat", "reshape", "permute")
    if made is None or depth == 0:
        return False
    if made.word == "reshape":
        joined = split_of(made.types[0].shape, state.type(made.args[0]).shape)
        return joined == how and made_in_product(state, made.args[0])
    if made.word == "permute":
        return made_in_parts(state, made.args[0], Split(made.numbers("dims")[how.axis], how.sizes), depth - 1)
    if made.word == "cat":
        parts, dim = made.args[0], int(str(made.attr("dim"))) % made.types[0].rank
        many = isinstance(parts, tuple) and len(parts) == how.sizes[0] and dim == how.axis
        return many and isinstance(parts, tuple) and all(state.type(p).shape[dim] == how.sizes[1] for p in parts)
    if made.word == "contract":
        return _of_matrix(state, made, how) is not None
    return any(
        made_in_parts(state, operand, Split(axis, how.sizes), depth - 1)
        for operand in made.args
        if isinstance(operand, Ref) and (axis := _axis_of(state, made, operand, how)) is not None
    )


def made_in_product(state: Rewriter, arg: Arg) -> bool:
    """Whether a value is a pointwise function of a product."""
    for _ in range(24):
        if state.by(arg, "contract") is not None:
            return True
        made = state.by(arg, *POINTS, "permute")
        arg = None if made is None else inner_of(state, made)
    return False


def inner_of(state: Rewriter, made: Instr) -> Arg:
    """The operand of a pointwise function or permute that another one, or a product, makes; None where none does."""
    wide = (a for a in made.args if isinstance(a, Ref) and state.type(a).rank == made.types[0].rank)
    return next((a for a in wide if state.by(a, *POINTS, "permute", "contract") is not None), None)


def _axis_of(state: Rewriter, made: Instr, arg: Arg, how: Split) -> int | None:
    """The operand's axis that is spread to the result's; None where it has none of that size."""
    kind = state.type(arg)
    axis = how.axis - (made.types[0].rank - kind.rank)
    return axis if axis >= 0 and kind.shape[axis] == how.sizes[0] * how.sizes[1] else None


def _of_matrix(state: Rewriter, made: Instr, how: Split) -> tuple[int, int] | None:
    """(which operand of a contraction has the axis, where), when that operand is a parameter and alone has it."""
    letters, out = equation_of(made)
    mine = [i for i, part in enumerate(letters) if out[how.axis] in part]
    if len(mine) != 1 or not state.stored(made.args[mine[0]]):
        return None
    return mine[0], letters[mine[0]].index(out[how.axis])


def _parted(kind: Type, how: Split) -> tuple[Dim, ...]:
    return (*kind.shape[: how.axis], *how.sizes, *kind.shape[how.axis + 1 :])


def _split(state: Rewriter, arg: Arg, how: Split) -> Arg:
    """The value with its axis split, as far up as parameters and parts are."""
    made, kind = state.by(arg, *POINTS, "contract", "cat", "reshape", "permute"), state.type(arg)
    to = Type(kind.dtype, _parted(kind, how))
    if made is None or not made_in_parts(state, arg, how):
        return state.reshape(arg, to.shape)
    if made.word == "reshape":
        return made.args[0]
    if made.word == "permute":
        order = made.numbers("dims")
        at = order[how.axis]
        inner = _split(state, made.args[0], Split(at, how.sizes))
        moved = [d + (d > at) for d in order]
        return state.permute(inner, (*moved[: how.axis + 1], at + 1, *moved[how.axis + 1 :]))
    if made.word == "cat":
        return state.emit("stack", made.args, to, dim=how.axis)
    if made.word == "contract":
        return _product(state, made, how, to)
    args: list[Arg] = []
    for operand in made.args:
        axis = _axis_of(state, made, operand, how) if isinstance(operand, Ref) else None
        if axis is not None:
            operand = _split(state, operand, Split(axis, how.sizes))
        elif isinstance(operand, Ref) and (at := how.axis - (kind.rank - state.type(operand).rank)) >= 0:
            shape = state.type(operand).shape  # of size 1 there
            operand = state.reshape(operand, (*shape[:at], sympy.S.One, *shape[at:]))
        args.append(operand)
    return state.emit(made.word, args, to, **dict(made.attrs))


def _product(state: Rewriter, made: Instr, how: Split, to: Type) -> Ref:
    """The contraction with the matrix's axis split."""
    (letters, out), found = equation_of(made), _of_matrix(state, made, how)
    assert found is not None
    which, at = found
    letter, args = out[how.axis], list(made.args)
    args[which] = state.reshape(args[which], _parted(state.type(args[which]), Split(at, how.sizes)))
    letters[which] = letters[which].replace(letter, f"{letter}Z")
    eq = f"{','.join(letters)}->{out.replace(letter, f'{letter}Z')}"
    return state.emit("contract", args, to, eq=normal_equation(eq))


def rule_joined(state: Rewriter, instr: Instr) -> Instr | None:
    """contract(reshape(h), W) over an axis that joins two: over the two, with W's axis split."""
    if instr.word != "contract":
        return None
    letters, out = equation_of(instr)
    for i, arg in enumerate(instr.args):
        joining = state.by(arg, "reshape")
        how = None
        if joining is not None:
            how = split_of(joining.types[0].shape, state.type(joining.args[0]).shape)
        if joining is None or how is None:
            continue
        letter, other = letters[i][how.axis], 1 - i
        if letter in out or letter not in letters[other] or not state.stored(instr.args[other]):
            continue
        if not made_in_product(state, joining.args[0]):
            continue
        args = list(instr.args)
        at = letters[other].index(letter)
        args[i] = joining.args[0]
        args[other] = state.reshape(args[other], _parted(state.type(args[other]), Split(at, how.sizes)))
        eq = f"{','.join(letters).replace(letter, f'{letter}Z')}->{out}"
        return again(instr, "contract", args, eq=normal_equation(eq))
    return None


def rule_half(state: Rewriter, instr: Instr) -> Instr | None:
    """slice(reshape(u)) of one of the two axes that one was split in: a slice of u, seen with an axis of size 1."""
    cut = state.by(instr.args[0], "reshape") if instr.word == "slice" else None
    if cut is None or not isinstance(cut.args[0], Ref) or not made_in_product(state, cut.args[0]):
        return None
    how = split_of(state.type(cut.args[0]).shape, cut.types[0].shape)
    dim, start, stop, step = (int(str(instr.attr(n))) for n in ("dim", "start", "stop", "step"))
    if how is None or how.axis == 0 or dim not in (how.axis, how.axis + 1) or step != 1 or stop - start != 1:
        return None
    outer, inner = (int(d) for d in how.sizes)
    bounds = (start * inner, stop * inner, 1) if dim == how.axis else (start, outer * inner, inner)
    shape = list(state.type(cut.args[0]).shape)
    shape[how.axis] = sympy.Integer(inner if dim == how.axis else outer)
    kind = Type(instr.types[0].dtype, tuple(shape))
    attrs = dict(zip(("dim", "start", "stop", "step"), (how.axis, *bounds), strict=True))
    return again(instr, "reshape", (state.emit("slice", (cut.args[0],), kind, **attrs),))


def rule_table(state: Rewriter, instr: Instr) -> Instr | None:
    """reshape(index(W[E, N], ids)) whose rows become matrices: index(reshape(W), ids)."""
    picked = state.by(instr.args[0], "index") if instr.word == "reshape" and len(instr.args) == 1 else None
    if picked is None or len(picked.args) != 2 or picked.attr("dim") != 0 or not state.stored(picked.args[0]):
        return None
    table, ids, shape = state.type(picked.args[0]), state.type(picked.args[1]), instr.types[0].shape
    if table.rank != 2 or state.type(picked.args[1]).dtype not in ("i64", "i32"):
        return None
    for lead in range(1, len(shape) - 1):
        rest = shape[lead:]
        if sympy.Mul(*rest) != table.shape[1] or not all(d.is_Integer and d > 1 for d in rest):
            continue
        if not same(sympy.Mul(*shape[:lead]), sympy.Mul(*ids.shape)):
            continue
        whole = state.reshape(picked.args[0], (table.shape[0], *rest))
        if shape[:lead] == ids.shape:
            return again(instr, "index", (whole, picked.args[1]), dim=0)
        rows = state.emit("index", (whole, picked.args[1]), Type(table.dtype, (*ids.shape, *rest)), dim=0)
        return again(instr, "reshape", (rows,))
    return None
