"""A number that a loop counts by hand is its item's place: what comes after looks at `enumerate` alone.

i = 0                          i = 0
for expert in experts:    →    for i, expert in enumerate(experts):
    …                              …
    i += 1

e = 0
while e < n:              →    for e in range(n):
    …; e += 1                      …
"""

from __future__ import annotations

import ast

from moec.capture.events import Path, after, loaded, nested, read_first, statements, stored


def counted(node: ast.FunctionDef) -> ast.FunctionDef:
    """The function, changed in place; it does what it did."""
    for stmt, path in list(statements(node)):
        if isinstance(stmt, ast.While):
            _as_for(stmt, path)
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


def _as_for(loop: ast.While, path: Path) -> None:
    """Put a `for` in the place of a `while` that counts from 0 to a number that its body does not change."""
    _, block, place = path[-1]
    name, test = _last_counts(loop), loop.test
    if name is None or loop.orelse or _leaves(loop) or name in read_first(after(path)):
        return
    below = isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Lt)
    if not below or not isinstance(test, ast.Compare) or ast.unparse(test.left) != name:
        return
    if not _begins_at_zero(block[:place], name) or not _is_fixed(test.comparators[0], loop.body):
        return
    if name in stored(loop.body[:-1]):
        return
    items = ast.Call(ast.Name("range", ast.Load()), [test.comparators[0]], [])
    made = ast.For(ast.Name(name, ast.Store()), items, loop.body[:-1], [])
    for node in (made, made.target, made.iter, items.func):
        ast.copy_location(node, loop)
    block[place] = made


def _is_fixed(end: ast.expr, body: list[ast.stmt]) -> bool:
    """Whether an expression is a number, or made of names and attributes that nothing in the body binds."""
    if isinstance(end, ast.Call) and isinstance(end.func, ast.Name) and end.func.id == "len" and len(end.args) == 1:
        end = end.args[0]
    if isinstance(end, ast.Constant):
        return type(end.value) is int
    root = end
    while isinstance(root, ast.Attribute):
        root = root.value
    sets = any(isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) for s in body for n in ast.walk(s))
    return isinstance(root, ast.Name) and root.id not in stored(body) and not sets


def _last_counts(loop: ast.For | ast.While) -> str | None:
    """The name that the body's last statement adds 1 to, where the body does something before."""
    last = loop.body[-1]
    if len(loop.body) < 2 or not isinstance(last, ast.AugAssign) or not isinstance(last.target, ast.Name):
        return None
    one = isinstance(last.value, ast.Constant) and type(last.value.value) is int and last.value.value == 1
    return last.target.id if one and isinstance(last.op, ast.Add) else None


def _leaves(loop: ast.For | ast.While) -> bool:
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
