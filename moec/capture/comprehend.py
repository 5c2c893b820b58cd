"""A comprehension as the loop that it abbreviates: `o = [f(c) for c in cs]`, `o = []; for c in cs: o.append(f(c))`."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

from moec.capture.events import Path, statements

_LIST = "_moec_list"


@dataclass(frozen=True)
class Unfolded:
    """A statement with its comprehension written out.

    stmt    the statement as written          path    the way to it
    holder  holds the statements that stand for it; the loop is among them
    """

    stmt: ast.stmt
    path: Path
    holder: ast.If
    loop: ast.For

    @property
    def loop_path(self) -> Path:
        """The way to the loop as if it stood in the function."""
        return (*self.path, (self.holder, self.holder.body, 1))


def unfolded(function: ast.FunctionDef) -> Iterator[Unfolded]:
    """The statements of a function that make one list by a comprehension, as loops that append to it."""
    for stmt, path in statements(function):
        if not isinstance(stmt, (ast.Assign, ast.Return, ast.Expr)) or stmt.value is None:
            continue
        found = [n for n in ast.walk(stmt.value) if isinstance(n, (ast.ListComp, ast.GeneratorExp))]
        if len(found) == 1 and isinstance(found[0], ast.ListComp) and len(found[0].generators) == 1:
            yield _written_out(stmt, path, found[0])


def _written_out(stmt: ast.Assign | ast.Return | ast.Expr, path: Path, made: ast.ListComp) -> Unfolded:
    each = made.generators[0]
    own = isinstance(stmt, ast.Assign) and stmt.value is made and len(stmt.targets) == 1
    target = stmt.targets[0] if own and isinstance(stmt, ast.Assign) else None
    listed = target.id if isinstance(target, ast.Name) else _LIST
    append = ast.Call(ast.Attribute(ast.Name(listed, ast.Load()), "append", ast.Load()), [made.elt], [])
    skips: list[ast.stmt] = [ast.If(ast.UnaryOp(ast.Not(), test), [ast.Continue()], []) for test in each.ifs]
    loop = ast.For(each.target, each.iter, [*skips, ast.Expr(append)], [])
    start = ast.Assign([ast.Name(listed, ast.Store())], ast.List([], ast.Load()))
    rest: list[ast.stmt] = []
    if not isinstance(target, ast.Name):
        swapped = _Swap(made, ast.Name(listed, ast.Load())).visit(_copied(stmt, made))
        assert isinstance(swapped, ast.stmt)
        rest.append(swapped)
    holder = ast.If(ast.Constant(True), [start, loop, *rest], [])
    for node in ast.walk(holder):
        if isinstance(node, (ast.expr, ast.stmt)) and not hasattr(node, "lineno"):
            node.lineno = node.end_lineno = stmt.lineno
            node.col_offset = node.end_col_offset = 0
    return Unfolded(stmt, path, holder, loop)


def _copied(stmt: ast.stmt, made: ast.ListComp) -> ast.stmt:
    """A copy of the statement that still holds the comprehension itself."""
    return copy.deepcopy(stmt, {id(made): made})


class _Swap(ast.NodeTransformer):
    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old = old
        self.new = new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)
