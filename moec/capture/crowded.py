"""A branch that cuts an expert's rows to the first C where there are more: the cut alone does the same.

if len(rows) > C: rows = rows[:C]; w = w[:C]      →   rows, w = rows[:C], w[:C]
rows = rows[:C] if rows.numel() > C else rows     →   rows = rows[:C]

Where there are no more than C, the first C are all of them. That what is cut has as many rows as were counted is asked
while the body is traced (`moec.capture.first`).
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moec.capture.empty import behind_shape
from moec.capture.events import called, loaded, statements, stored
from moec.capture.words import assign, call, name

_ASKED = "_moec_crowd"


@dataclass(frozen=True)
class _Crowd:
    """`len(rows) > most`: how the rows are counted (`len` along the first axis, or `numel`)."""

    rows: str
    how: str
    most: ast.expr


def uncrowded(loop: ast.For, tainted: frozenset[str], key: ast.Constant) -> ast.For:
    """A copy of a loop without such branches on rows that depend on its item."""
    out = copy.deepcopy(loop)
    counts = _counted_names(out, tainted)
    asking = tainted | {counted.rows for counted in counts.values()}
    _Cuts(asking, counts, key).visit(ast.Module(out.body, []))
    for stmt, path in list(statements(out)):
        if not isinstance(stmt, ast.If) or stmt.orelse or not all(isinstance(o, (ast.If, ast.For)) for o, _, _ in path):
            continue
        crowd = _crowd(stmt.test, counts)
        if crowd is None or crowd.rows not in asking:
            continue
        if loaded([crowd.most]) & (tainted | stored(stmt.body)) or not all(_cut(s, crowd) for s in stmt.body):
            continue
        block = path[-1][1]
        place = block.index(stmt)
        block[place : place + 1] = [assign(_ASKED, name(crowd.rows)), *_first(stmt.body, crowd, key)]
    return out


@dataclass(frozen=True)
class _Counted:
    """What holds the rows that a name is the number of, and how they were counted."""

    rows: str
    how: str


class _Cuts(ast.NodeTransformer):
    """`rows[:C] if len(rows) > C else rows`."""

    def __init__(self, asking: frozenset[str], counts: Mapping[str, _Counted], key: ast.Constant) -> None:
        self.asking, self.counts, self.key = asking, counts, key

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        crowd = _crowd(node.test, self.counts)
        if crowd is None or crowd.rows not in self.asking or loaded([crowd.most]) & self.asking:
            return node
        if not isinstance(node.orelse, ast.Name) or not _cuts(node.body, node.orelse.id, crowd):
            return node
        return call("first", self.key, ast.Constant(crowd.how), name(crowd.rows), node.orelse, crowd.most)


def _first(cuts: list[ast.stmt], crowd: _Crowd, key: ast.Constant) -> Iterator[ast.stmt]:
    for cut in cuts:
        (target,) = stored([cut])
        how = ast.Constant(crowd.how)
        yield assign(target, call("first", key, how, name(_ASKED), name(target), copy.deepcopy(crowd.most)))


def _cut(stmt: ast.stmt, crowd: _Crowd) -> bool:
    """`w = w[:C]`."""
    if not isinstance(stmt, ast.Assign) or len(stmt.targets) != 1 or not isinstance(stmt.targets[0], ast.Name):
        return False
    return _cuts(stmt.value, stmt.targets[0].id, crowd)


def _cuts(expr: ast.expr, rows: str, crowd: _Crowd) -> bool:
    """`w[:C]` of the C that the rows were compared with."""
    if not isinstance(expr, ast.Subscript) or not isinstance(expr.value, ast.Name) or expr.value.id != rows:
        return False
    at = expr.slice
    plain = isinstance(at, ast.Slice) and at.lower is None and at.step is None
    return plain and isinstance(at, ast.Slice) and at.upper is not None and ast.dump(at.upper) == ast.dump(crowd.most)


def _crowd(test: ast.expr, counts: Mapping[str, _Counted]) -> _Crowd | None:
    """`len(rows) > C`, `C < rows.shape[0]`, `n > C` of such a number; C without calls."""
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        return None
    left, op, right = test.left, test.ops[0], test.comparators[0]
    if isinstance(op, (ast.Lt, ast.LtE)):
        left, right = right, left
    elif not isinstance(op, (ast.Gt, ast.GtE)):
        return None
    counted = counts.get(left.id) if isinstance(left, ast.Name) else _counted(left)
    pure = not any(isinstance(n, (ast.Call, ast.NamedExpr, ast.Await)) for n in ast.walk(right))
    return _Crowd(counted.rows, counted.how, right) if counted is not None and pure else None


def _counted(expr: ast.expr) -> _Counted | None:
    """The rows that an expression counts: `len(rows)`, `rows.shape[0]`, `rows.size(0)`, `rows.numel()`."""
    if isinstance(expr, ast.Subscript):
        own = behind_shape(expr)
        return _Counted(own.id, "len") if isinstance(own, ast.Name) else None
    if not isinstance(expr, ast.Call) or expr.keywords:
        return None
    method = isinstance(expr.func, ast.Attribute)
    own = expr.func.value if isinstance(expr.func, ast.Attribute) else expr.args[0] if expr.args else None
    args = expr.args if method else expr.args[1:]
    word = called(expr)
    if not isinstance(own, ast.Name) or (method, word) not in _COUNTING:
        return None
    fits = len(args) == 1 and _is_zero(args[0]) if word == "size" else not args
    return _Counted(own.id, "numel" if word in ("numel", "nelement") else "len") if fits else None


_COUNTING = frozenset(((False, "len"), (True, "size"), (True, "numel"), (True, "nelement"), (True, "__len__")))


def _is_zero(expr: ast.expr) -> bool:
    return isinstance(expr, ast.Constant) and expr.value == 0


def _counted_names(loop: ast.For, tainted: frozenset[str]) -> dict[str, _Counted]:
    """The names that the body binds once, to a number of rows; what was counted is held by a name of its own."""
    found: dict[str, _Counted] = {}
    for stmt in list(loop.body):
        target = stmt.targets[0] if isinstance(stmt, ast.Assign) and len(stmt.targets) == 1 else None
        counted = _counted(stmt.value) if isinstance(stmt, ast.Assign) else None
        if not isinstance(target, ast.Name) or counted is None or counted.rows not in tainted:
            continue
        binds = (n for n in ast.walk(loop) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        if sum(n.id == target.id for n in binds) == 1:
            held = f"_moec_counted_{target.id}"
            loop.body.insert(loop.body.index(stmt), assign(held, name(counted.rows)))
            found[target.id] = _Counted(held, counted.how)
    return found
