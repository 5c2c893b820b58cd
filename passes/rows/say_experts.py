"""Say matched experts as one `experts` instruction in the place of the value that they make.

%y.rows[T, O] = experts(%x[T, H], %w[T, k], %e[T, k], (…)) spec form experts width; %y = reshape(%y.rows, %x)
"""

from __future__ import annotations

import sympy

from moec.ir.graph import Attr, Dim, Instr, Ref, Type
from moec.ir.spec import KernelSpec
from moec.passes.rows.body import NOTHING, BodyMatch
from moec.passes.rows.pairs import Writer


def filled(out: Writer, name: str) -> str:
    """A parameter, or the zeros that stand for one."""
    if not name.endswith(NOTHING):
        return name
    like = name.removesuffix(NOTHING)
    return out.emit("zeros_like", (Ref(like),), out.type(like))


def vector(out: Writer, name: str, role: str, body: BodyMatch) -> str:
    """A bias in its dtype; one kept as [E, 1, F] is seen as [E, F]."""
    shape = out.type(name).shape
    if body.spec.stacked and len(shape) == 3:
        name = out.reshape(name, (shape[0], shape[2]))
    return out.cast(name, body.spec.stored(role))


def params_of(out: Writer, body: BodyMatch) -> tuple[Ref, ...]:
    """The parameters in kernel order."""
    refs: list[Ref] = []
    for role, group in zip(body.spec.param_groups, body.params, strict=True):
        for name in group:
            name = filled(out, name)
            refs.append(Ref(vector(out, name, role, body) if role.startswith("bias_") else name))
    return tuple(refs)


def site_attrs(body: BodyMatch, dtype: str, form: str) -> tuple[tuple[str, Attr], ...]:
    """What an `experts` instruction says of itself; `dtype` is its result's."""
    return (
        ("spec", str(KernelSpec(body.spec, None, dtype))),
        ("form", form),
        ("experts", _number(body.num_experts)),
        ("width", _number(body.width)),
    )


def _number(size: Dim) -> int | str:
    return int(size) if size.is_Integer else str(size)


def say_experts(
    out: Writer, body: BodyMatch, weights: str, choice: str, form: str, *more: tuple[str, Attr]
) -> tuple[Instr, ...]:
    """What `out` has said, then its root: experts on the flat rows of the body's tokens, seen in the root's shape."""
    root, x = out.root, out.graph.types[body.token]
    (name,), to = root.results, root.types[0]
    tokens = sympy.Mul(*x.shape[:-1])
    flat = (tokens, body.out)
    params, rows = params_of(out, body), out.reshape(body.token, (tokens, x.shape[-1]))
    args = (Ref(rows), Ref(weights), Ref(choice), params)
    attrs = (*site_attrs(body, to.dtype, form), *more)
    if to.shape == flat:
        return (*out.instrs, Instr((name,), "experts", args, (to,), attrs, root.loc))
    made = Instr((f"{name}.rows",), "experts", args, (Type(to.dtype, flat),), attrs, root.loc)
    return (*out.instrs, made, _seen_as(root, x, body.token))


def _seen_as(root: Instr, x: Type, token: str) -> Instr:
    """The rows in the root's shape: the tokens' own, or the tokens' axes before others that numbers give."""
    (name,), to, lead = root.results, root.types[0], x.rank - 1
    rest = to.shape[lead:]
    split = to.shape[:lead] == x.shape[:-1] and sum(not d.is_Integer or d == 0 for d in to.shape) > 1
    if to.shape != x.shape and split and all(d.is_Integer and d != 0 for d in rest):
        tail = tuple(int(d) for d in rest)
        return Instr((name,), "reshape", (Ref(f"{name}.rows"), Ref(token)), (to,), (("tail", tail),), root.loc)
    like = (Ref(token),) if to.shape == x.shape else ()
    return Instr((name,), "reshape", (Ref(f"{name}.rows"), *like), (to,), (), root.loc)
