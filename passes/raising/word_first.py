"""How the first of as many rows as data say are raised: rows[:C] → first(rows){most}, however few there are."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from moec.ir.dims import dim_text
from moec.ir.graph import Arg, Type
from moec.passes.raising.raise_graph import Builder, dim_of, fake, type_of_fake


def first_rows(build: Builder, node: fx.Node) -> Arg | None:
    """rows[:C], rows[:min(C, len(rows)), None] → first; None where it is no such index, or C could be below 0."""
    source, index = node.args[:2]
    items = list(index) if isinstance(index, tuple | list) else [index]
    added = next((place for place, each in enumerate(items) if each is not None), 0)
    item = items[added]
    rows = fake(source) if isinstance(source, fx.Node) else None
    if not isinstance(item, slice) or not isinstance(rows, torch.Tensor) or rows.dim() == 0:
        return None
    if any(each is not None and each is not Ellipsis and each != slice(None) for each in items[added + 1 :]):
        return None
    if item.start not in (None, 0) or item.step not in (None, 1) or not free_unbacked_symbols(rows.shape[0]):
        return None
    most = _most(item.stop, dim_of(rows.shape[0]))
    if most is None:
        return None
    limit = int(most) if most.is_Integer else dim_text(most)
    value, to = build.value(source), type_of_fake(fake(node))
    shape = (to.shape[added], *build.type_of(value).shape[1:])
    first = build.emit("first", (value,), Type(to.dtype, shape), most=limit)
    return first if shape == to.shape else build.emit("reshape", (first,), to)


def _most(stop: Any, rows: sympy.Expr) -> sympy.Expr | None:
    """How many rows an index leaves at most, where data do not say so."""
    value = fake(stop) if isinstance(stop, fx.Node) else stop
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        return None
    limit: Any = dim_of(value)
    if type(limit).__name__ == "Min" and rows in limit.args:
        left = [arg for arg in limit.args if arg != rows]
        limit = left[0] if len(left) == 1 else type(limit)(*left)
    known = not any(str(symbol).startswith("u") for symbol in limit.free_symbols)  # torch's names of what data say
    return limit if known and statically_known_true(value >= 0) else None
