"""A number that a loop counts by hand is its item's place: what comes after looks at `enumerate` alone.

i = 0                          i = 0
for expert in experts:    →    for i, expert in enumerate(experts):
    …                              …
    i += 1
"""

from __future__ import annotations

import ast

from moec.capture.events import after, loaded, nested, read_first, statements, stored


def counted(node: ast.FunctionDef) -> ast.FunctionDef:
    """The function, changed in place; it does what it did."""
    for stmt, path in list(statements(node)):
        if not isinstance(stmt, ast.For) or stmt.orelse or not stmt.body or _leaves(stmt):
            continue
        name = _last_counts(stmt)
        _, block, place = path[-1]
        if name is None or name in read_first(after(path)) or not _begins_at_zero(block[:place], name):
            continue
        if name in stored([stmt.target]) | stored(stmt.body[:-1]) | loaded([stmt.iter]):
            continue
        del stmt.body[-1]
        counter = ast.copy_location(ast.Name(name, ast.Store()), stmt.target)
        stmt.target = ast.copy_location(ast.Tuple([counter, stmt.target], ast.Store()), stmt.target)
        function = ast.copy_location(ast.Name("enumerate", ast.Load()), stmt.iter)
        stmt.iter = ast.copy_location(ast.Call(function, [stmt.iter], []), stmt.iter)
    return node


def _last_counts(loop: ast.For) -> str | None:
    """The name that the body's last statement adds 1 to, where the body does something before."""
    last = loop.body[-1]
    if len(loop.body) < 2 or not isinstance(last, ast.AugAssign) or not isinstance(last.target, ast.Name):
        return None
    one = isinstance(last.value, ast.Constant) and type(last.value.value) is int and last.value.value == 1
    return last.target.id if one and isinstance(last.op, ast.Add) else None


def _leaves(loop: ast.For) -> bool:
    """Whether an iteration may end before its last statement."""
    inside = nested(loop)
    return any(isinstance(n, (ast.Continue, ast.Break)) and id(n) not in inside for n in ast.walk(loop))


def _begins_at_zero(before: list[ast.stmt], name: str) -> bool:
    """Whether the last statement of the block that binds the name says 0."""
    for stmt in reversed(before):
        if name in stored([stmt]):
            if not isinstance(stmt, ast.Assign) or len(stmt.targets) > 1 or not isinstance(stmt.targets[0], ast.Name):
                return False
            value = stmt.value
            return isinstance(value, ast.Constant) and type(value.value) is int and value.value == 0
    return False
