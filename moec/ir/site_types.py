"""The types of a site's own values and parameters, which follow from its words."""

from __future__ import annotations

import sympy

from moec.ir import site as ir
from moec.ir.graph import Type


def derived_types(site: ir.Site) -> dict[str, tuple[Type, ...]]:
    """The types of the block's own values and of the parameters, by what stands left of '=' in its text."""
    experts, select, body = site.num_experts, site.select, site.body
    tokens = sympy.Mul(*site.x_type.shape[:-1])
    pairs = (tokens, select.k) if select.budget == "token" else (select.nnz,)
    h_in, h_out = site.x_type.shape[-1:], site.y_type.shape[-1:]
    types: dict[str, tuple[Type, ...]] = {
        "%s": (Type(site.score.dtype, (tokens, experts)),),
        "%e, %p": (Type("i64", pairs), Type(site.score.dtype, pairs)),
        "%w": (Type(site.weight.dtype, pairs),),
        "%r, %off": (Type(site.x_type.dtype, (site.dispatch.rows, *h_in)), Type("i64", (experts + 1,))),
        "%h": (Type(body.dtype, (site.dispatch.rows, *h_out)),),
    }
    if body.kind == "opaque" or body.transform.kind != "identity" or not h_in or not h_out:
        return types
    for role, names in body.params:
        shape = _param_shape(body, role, h_in[0], h_out[0])
        if shape:
            types[role] = (Type(body.dtype, (experts, *shape) if len(names) == 1 else shape),)
    return types


def _param_shape(body: ir.Body, role: str, h_in: sympy.Expr, h_out: sympy.Expr) -> tuple[sympy.Expr, ...]:
    """The shape of one expert's parameter of a known role; () for others."""
    first = body.width * (2 if body.gate in ("concat", "interleaved") else 1)
    shapes = {"ab": (first, h_in), "a": (body.width, h_in), "b": (body.width, h_in), "out": (h_out, body.width)}
    if role.startswith("bias_"):
        return shapes.get(role.removeprefix("bias_"), ())[:1]
    shape = shapes.get(role, ())
    layout = body.layout_out if role == "out" else body.layout_in
    return shape if layout == "nk" else shape[::-1]
