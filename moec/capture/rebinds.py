"""How a loop's body binds a name anew: by adding, in place or not, or by a cast that changes nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from moec.capture.events import stored

# Torch's words for "add or write at these rows"; the place of the row index among the arguments of the method.
WRITES = {
    "index_add": 1,
    "scatter_add": 1,
    "index_put": 0,
    "index_copy": 1,
    "scatter": 1,
    "scatter_reduce": 1,
    "index_reduce": 1,
    "masked_scatter": 0,
    "masked_fill": 0,
    "index_fill": 1,
    "slice_scatter": 0,
}


def flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, those inside others too."""
    for stmt in body:
        yield stmt
        for field in ("body", "orelse"):
            yield from flat(getattr(stmt, field, []))


def rebound_name(stmt: ast.stmt) -> str | None:
    """The one name that a statement assigns to."""
    target = stmt.targets[0] if isinstance(stmt, ast.Assign) else getattr(stmt, "target", None)
    return target.id if isinstance(target, ast.Name) else None


def updates(loop: ast.For, name: str) -> list[ast.stmt]:
    """The statements of a loop that bind the name."""
    return [s for s in flat(loop.body) if rebound_name(s) == name and name in stored([s])]


def recast(stmt: ast.stmt, name: str) -> bool:
    """`y = y.to(rows.dtype)`: nothing, where the dtype is that already."""
    if not isinstance(stmt, ast.Assign) or len(stmt.targets) != 1 or rebound_name(stmt) != name:
        return False
    value = stmt.value
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute) or value.keywords:
        return False
    same = isinstance(value.func.value, ast.Name) and value.func.value.id == name
    return same and value.func.attr in ("to", "type", "type_as") and len(value.args) == 1


def keeps(stmt: ast.stmt, name: str) -> bool:
    """Whether a statement binds the name to the tensor that it held."""
    return isinstance(stmt, ast.AugAssign) or recast(stmt, name)


def adds(stmt: ast.stmt, name: str) -> bool:
    """Whether a statement adds to what the name holds, in place or not."""
    if isinstance(stmt, ast.AugAssign):
        return isinstance(stmt.op, ast.Add)
    if not isinstance(stmt, ast.Assign):
        return False
    value = stmt.value
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return any(isinstance(side, ast.Name) and side.id == name for side in (value.left, value.right))
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
        return False
    base = (
        value.args[0] if isinstance(value.func.value, ast.Name) and value.func.value.id == "torch" else value.func.value
    )
    return isinstance(base, ast.Name) and base.id == name and value.func.attr.rstrip("_") in (*WRITES, "add")
