"""A loop that does one thing for some items and another for the rest, as two loops that each skip the other's items.

for e: if e < n: y.index_add_(…A…) else: y.index_add_(…B…)   →   for e: if not e < n: continue; …A…
                                                                 for e: if e < n: continue; …B…
"""

from __future__ import annotations

import ast
import copy
import dataclasses

from moec.capture.events import loaded
from moec.capture.recognise import Candidate

_ADDING = frozenset(("index_add", "scatter_add"))


MOST = 4
"""A loop that is run more often than this, each time for other items, is left as it is written."""


def branches(candidate: Candidate) -> list[Candidate]:
    """The loop itself, or the loops for the sides of each `if` that depends on the item and goes on after it.

    Sums come in another order, as in any rolled loop; so only sums may be written, and before the `if` nothing.
    """
    body = candidate.loop.body
    for place, stmt in enumerate(body):
        if not isinstance(stmt, ast.If) or not loaded([stmt.test]) & candidate.tainted or _ends(stmt):
            continue
        if not stmt.orelse and place + 1 == len(body):
            continue
        before, after = body[:place], body[place + 1 :]
        if candidate.counters or candidate.collected or _writes(before) or not only_adds(body):
            break
        skip, other = _continue_if(ast.UnaryOp(ast.Not(), stmt.test), stmt), _continue_if(stmt.test, stmt)
        parts = ([*before, skip, *stmt.body, *after], [*before, other, *stmt.orelse, *after])
        made = [each for part in parts for each in branches(_with_body(candidate, part))]
        if len(made) > MOST:
            break
        # The lesser side first: what experts without matrices add is where the sum of the others begins.
        return sorted(made, key=lambda each: _size(each.loop.body))
    return [candidate]


def _size(body: list[ast.stmt]) -> int:
    """How much code there is."""
    return sum(1 for stmt in body for _ in ast.walk(stmt))


def _with_body(candidate: Candidate, body: list[ast.stmt]) -> Candidate:
    loop = candidate.loop
    made = ast.For(loop.target, loop.iter, copy.deepcopy(body), [])
    return dataclasses.replace(candidate, loop=ast.copy_location(made, loop))


def _continue_if(test: ast.expr, like: ast.stmt) -> ast.If:
    made = ast.copy_location(ast.If(test, [ast.Continue()], []), like)
    return ast.fix_missing_locations(made)


def _ends(stmt: ast.If) -> bool:
    """Whether one side of an `if` only ends the iteration."""
    return any(len(side) == 1 and isinstance(side[0], ast.Continue) for side in (stmt.body, stmt.orelse))


def _writes(body: list[ast.stmt]) -> bool:
    """Whether statements write to what they did not make."""
    nodes = [n for stmt in body for n in ast.walk(stmt)]
    stores = any(isinstance(n, (ast.Subscript, ast.Attribute)) and isinstance(n.ctx, ast.Store) for n in nodes)
    return stores or any(isinstance(n, ast.AugAssign) for n in nodes) or any(_in_place(n) for n in nodes)


def only_adds(body: list[ast.stmt]) -> bool:
    """Whether everything that is written is added to."""
    nodes = [n for stmt in body for n in ast.walk(stmt)]
    called = [
        n.func.attr for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and _in_place(n)
    ]
    plain = [
        n
        for n in nodes
        if isinstance(n, ast.Assign) and any(isinstance(t, ast.Subscript) for t in n.targets) and not _adds_there(n)
    ]
    joined = [n for n in nodes if isinstance(n, ast.AugAssign) and not isinstance(n.op, ast.Add)]
    return not plain and not joined and all(name.rstrip("_") in _ADDING for name in called)


def _adds_there(stmt: ast.Assign) -> bool:
    """`y[rows] = y[rows] + …`."""
    value, target = stmt.value, ast.unparse(stmt.targets[0])
    sides = (value.left, value.right) if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add) else ()
    return len(stmt.targets) == 1 and any(ast.unparse(side) == target for side in sides)


def _in_place(node: ast.AST) -> bool:
    """A call of a method that changes its tensor: `y.index_add_(…)`."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return node.func.attr.endswith("_") and not node.func.attr.endswith("__")
