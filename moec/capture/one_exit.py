"""A function's lines with one exit at their end: `return v` binds a name, what comes after stands on the other side.

if a: return f(x)                 if a: result = f(x)
z = g(x)                     →    else: z = g(x); result = z
return z
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable


def one_exit(
    body: list[ast.stmt], result: str, ends: Callable[[ast.expr], bool] | None = None
) -> list[ast.stmt] | None:
    """The lines, with what is returned bound to `result`; None where they leave a loop, or would be written twice.

    ends: of a returned value, whether the loop around the lines then goes on with its next item (`continue`)
    """
    for place, stmt in enumerate(body):
        rest = body[place + 1 :]
        if isinstance(stmt, ast.Return):
            return [*body[:place], _leave(stmt, result, ends)]
        if not has_return(stmt):
            continue
        if not isinstance(stmt, ast.If):
            return None
        sides = [stmt.body, stmt.orelse]
        if not any(_always_returns(side) for side in sides) and rest:
            return None  # what follows would stand on both sides
        made = [one_exit(side if _always_returns(side) else [*side, *rest], result, ends) for side in sides]
        then, other = made
        if then is None or other is None:
            return None
        if _is_continue(then):  # a guard: what follows need not stand inside of it
            return [*body[:place], _if(stmt, stmt.test, then, []), *other]
        if _is_continue(other):
            return [*body[:place], _if(stmt, ast.UnaryOp(ast.Not(), stmt.test), other, []), *then]
        return [*body[:place], _if(stmt, stmt.test, then, other)]
    none = ast.Return(ast.Constant(None))
    return [*body, _leave(ast.copy_location(none, body[-1]) if body else none, result, None)]


def has_return(stmt: ast.stmt) -> bool:
    """Whether a function may be left inside the statement."""
    return any(isinstance(node, ast.Return) for node in ast.walk(stmt))


def _leave(stmt: ast.Return, result: str, ends: Callable[[ast.expr], bool] | None) -> ast.stmt:
    value = stmt.value if stmt.value is not None else ast.Constant(None)
    made: ast.stmt = ast.Assign([ast.Name(result, ast.Store())], value)
    if ends is not None and ends(value):
        made = ast.Continue()
    return ast.fix_missing_locations(ast.copy_location(made, stmt))


def _if(like: ast.If, test: ast.expr, then: list[ast.stmt], other: list[ast.stmt]) -> ast.If:
    return ast.fix_missing_locations(ast.copy_location(ast.If(copy.deepcopy(test), then, other), like))


def _always_returns(block: list[ast.stmt]) -> bool:
    if not block:
        return False
    last = block[-1]
    if isinstance(last, ast.If):
        return _always_returns(last.body) and _always_returns(last.orelse)
    return isinstance(last, ast.Return)


def _is_continue(block: list[ast.stmt]) -> bool:
    return len(block) == 1 and isinstance(block[0], ast.Continue)
