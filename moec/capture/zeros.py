"""The other side of an `if` on an expert's rows, where all that it does is to add zeros.

if rows.any(): y[rows] += …                      if rows.any(): y[rows] += …
elif self.training: y[0] += 0 * sum(…)     →

Such a line gives idle experts a gradient of zeros, which a rolled loop gives them anyhow. What is left out differs from
what is written only where a parameter of an idle expert is no finite number.
"""

from __future__ import annotations

import ast
import copy

from moec.capture.events import called, loaded
from moec.capture.recognise import tainted_by


def without_zeros(loop: ast.For) -> ast.For | None:
    """A copy of the loop without such sides; None where it has none."""
    sides = [(i, s) for i, s in enumerate(loop.body) if isinstance(s, ast.If) and s.orelse]
    tainted = tainted_by(loop) if sides else set[str]()
    found = [i for i, s in sides if loaded([s.test]) & tainted and _adds_zeros(s.orelse, tainted)]
    if not found:
        return None
    out = copy.deepcopy(loop)
    for i in found:
        stmt = out.body[i]
        assert isinstance(stmt, ast.If)
        stmt.orelse = []
    return out


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
