"""The other side of an `if` on an expert's rows, where all that it does is to add zeros.

if rows.any(): y[rows] += …                      if rows.any(): y[rows] += …
elif self.training: y[0] += 0 * sum(…)     →

Such a line gives idle experts a gradient of zeros, which a rolled loop gives them anyhow. What is left out differs from
what is written only where a parameter of an idle expert is no finite number. Two sides that do the same but for such
zeros are one:

if len(rows): y[m] = rows                        y[m] = rows
else: y[m] = rows + 0 * sum(…)            →
"""

from __future__ import annotations

import ast
import copy

from moec.capture.asks import ASK_MASKS, ASK_SIZES
from moec.capture.events import called, loaded
from moec.capture.recognise import tainted_by


def without_zeros(loop: ast.For) -> ast.For | None:
    """A copy of the loop without such sides; None where it has none."""
    sides = [(i, s) for i, s in enumerate(loop.body) if isinstance(s, ast.If) and s.orelse]
    tainted = tainted_by(loop) if sides else set[str]()
    sides = [(i, s) for i, s in sides if loaded([s.test]) & tainted]
    found = [i for i, s in sides if _adds_zeros(s.orelse, tainted)]
    same = [i for i, s in sides if i not in found and _only_asks(s.test) and _alike(s.body, s.orelse)]
    if not found and not same:
        return None
    out = copy.deepcopy(loop)
    for i in reversed(range(len(out.body))):
        stmt = out.body[i]
        if isinstance(stmt, ast.If) and i in found:
            stmt.orelse = []
        elif isinstance(stmt, ast.If) and i in same:
            out.body[i : i + 1] = [_Finite().visit(inner) for inner in stmt.body]
    return out


_ASKS = ASK_MASKS | ASK_SIZES | {"item", "bool"}


def _only_asks(test: ast.expr) -> bool:
    """Whether a condition has no effect of its own."""
    calls = [node for node in ast.walk(test) if isinstance(node, ast.Call)]
    binds = any(isinstance(node, ast.NamedExpr) for node in ast.walk(test))
    return not binds and all(called(node) in _ASKS for node in calls)


def _alike(side: list[ast.stmt], other: list[ast.stmt]) -> bool:
    """Whether two blocks are the same but for zeros that are added."""
    first, second = ([ast.dump(_Finite().visit(copy.deepcopy(stmt))) for stmt in block] for block in (side, other))
    return first == second


class _Finite(ast.NodeTransformer):
    """Sums without the zeros that they add."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Add):
            return node
        return node.right if _is_zero(node.left) else node.left if _is_zero(node.right) else node


def _adds_zeros(block: list[ast.stmt], tainted: set[str]) -> bool:
    """Whether statements only add zeros, perhaps under a condition that is the same for every expert."""
    for stmt in block:
        if isinstance(stmt, ast.If):
            calls = any(isinstance(n, ast.Call | ast.NamedExpr) for n in ast.walk(stmt.test))
            sides = _adds_zeros(stmt.body, tainted) and _adds_zeros(stmt.orelse, tainted)
            if calls or loaded([stmt.test]) & tainted or not sides:
                return False
        elif not isinstance(stmt, ast.Pass) and not _adds_zero(stmt):
            return False
    return True


def _adds_zero(stmt: ast.stmt) -> bool:
    """`y[…] += 0 * …` and `y = y + … * 0.0`."""
    if isinstance(stmt, ast.AugAssign) and isinstance(stmt.op, ast.Add):
        return _is_zero(stmt.value)
    if not isinstance(stmt, ast.Assign) or len(stmt.targets) != 1 or not isinstance(stmt.value, ast.BinOp):
        return False
    target, value = ast.unparse(stmt.targets[0]), stmt.value
    sides = ((value.left, value.right), (value.right, value.left))
    return isinstance(value.op, ast.Add) and any(ast.unparse(a) == target and _is_zero(b) for a, b in sides)


_READS = frozenset(("sum", "mean", "norm", "parameters", "values", "view", "reshape", "flatten", "to", "float"))


def _is_zero(expr: ast.expr) -> bool:
    """A product of the number 0 and of what only reads parameters: an expert that is called might do more."""
    if isinstance(expr, ast.Constant):
        return type(expr.value) in (int, float) and expr.value == 0
    if not all(called(node) in _READS for node in ast.walk(expr) if isinstance(node, ast.Call)):
        return False
    return isinstance(expr, ast.BinOp) and isinstance(expr.op, ast.Mult) and any(map(_is_zero, (expr.left, expr.right)))
