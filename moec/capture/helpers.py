"""A method that a loop's body hands its item to is written out in the body: what it indexes is then seen.

def run(self, i, rows): return self.experts[i](rows)      y[t] += self.run(e, x[t])   →   y[t] += self.experts[e](x[t])

Only methods of straight lines with one return at their end. While it is traced, the rolled body asks whether the method
is still the one that was written out: a subclass may have another.
"""

from __future__ import annotations

import ast
import copy
import itertools
import types
from collections.abc import Callable, Iterator

from moec.capture import source
from moec.capture.events import stored
from moec.capture.recognise import aliases_of, in_place_names, is_alias
from moec.capture.state import loop_key
from moec.capture.words import call, name

Methods = Callable[[str], types.FunctionType | None]
"""A method of the class that a function belongs to, by name."""

_PREFIX = "_moec_in"
_STRAIGHT = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr)
_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.FunctionDef, ast.NamedExpr)
_LEAVES = (ast.Return, ast.Yield, ast.YieldFrom, ast.Await)
_MAYBE = (ast.IfExp, ast.BoolOp, *_SCOPES)


def written_out(loop: ast.For, owner: ast.FunctionDef, file: str, methods: Methods) -> ast.For | None:
    """A copy of the loop with its item's helper methods written out; None where there are none."""
    own = owner.args.args[0].arg if owner.args.args else ""
    key = ast.Constant(loop_key(file, loop.lineno))
    out, numbers = copy.deepcopy(loop), itertools.count()
    aliases = aliases_of(out)
    asked: dict[str, ast.stmt] = {}
    for block in _blocks(out):
        for stmt in list(block):
            found = _helper(stmt, own, aliases, file, methods)
            if found is None:
                continue
            made, helper, function = found
            lines = _lines(stmt, made, helper, next(numbers))
            if lines is None:
                continue
            place = block.index(stmt)
            block[place : place + 1] = lines
            where = ast.Constant(f"{file}:{function.__code__.co_firstlineno}")
            asked[helper.name] = ast.Expr(call("expects", key, name(own), ast.Constant(helper.name), where))
    if not asked:
        return None
    out.body[:0] = asked.values()
    for node in ast.walk(out):
        if isinstance(node, (ast.expr, ast.stmt)) and not hasattr(node, "lineno"):
            ast.copy_location(node, loop)
    return out


def _blocks(loop: ast.For) -> Iterator[list[ast.stmt]]:
    """The loop's body and the blocks of the `if`s in it."""
    todo = [loop.body]
    while todo:
        block = todo.pop()
        yield block
        todo += [part for stmt in block if isinstance(stmt, ast.If) for part in (stmt.body, stmt.orelse) if part]


def _helper(
    stmt: ast.stmt, own: str, aliases: set[str], file: str, methods: Methods
) -> tuple[ast.Call, ast.FunctionDef, types.FunctionType] | None:
    """The one call in a statement that hands the item to a method which can be written out."""
    if not isinstance(stmt, (ast.Assign, ast.AugAssign, ast.Expr)):
        return None
    hidden = {id(n) for m in ast.walk(stmt) if isinstance(m, _MAYBE) for n in ast.walk(m)}
    calls = [
        n
        for n in ast.walk(stmt.value)
        if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Attribute)
        and isinstance(n.func.value, ast.Name)
        and n.func.value.id == own
        and any(is_alias(a, aliases) for a in (*n.args, *(k.value for k in n.keywords)))
    ]
    if len(calls) != 1 or id(calls[0]) in hidden or not isinstance(calls[0].func, ast.Attribute):
        return None
    function = methods(calls[0].func.attr)
    if function is None or function.__code__.co_filename != file or function.__code__.co_freevars:
        return None
    try:
        helper = source.parse(function.__code__)
    except source.NoSource:
        return None
    return (calls[0], helper, function) if _is_straight(helper) else None


def _is_straight(helper: ast.FunctionDef) -> bool:
    args = helper.args
    if helper.decorator_list or args.vararg or args.kwarg or args.kwonlyargs or args.defaults or args.posonlyargs:
        return False
    if any(isinstance(n, _SCOPES) and n is not helper for n in ast.walk(helper)):
        return False
    if any(isinstance(n, ast.Attribute) and n.attr.startswith("__") for n in ast.walk(helper)):
        return False
    *lines, last = helper.body
    straight = all(isinstance(s, _STRAIGHT) for s in lines) and isinstance(last, (*_STRAIGHT, ast.Return))
    return straight and sum(isinstance(n, _LEAVES) for n in ast.walk(helper)) == isinstance(last, ast.Return)


def _lines(stmt: ast.stmt, made: ast.Call, helper: ast.FunctionDef, number: int) -> list[ast.stmt] | None:
    """The helper's statements, then the statement with what the helper returns in the place of its call."""
    params = [a.arg for a in helper.args.args]
    given: dict[str, ast.expr] = {params[0]: made.func.value}  # type: ignore[attr-defined]
    given |= dict(zip(params[1:], made.args, strict=False))
    given |= {k.arg: k.value for k in made.keywords if k.arg is not None}
    if set(given) != set(params) or len(made.args) + len(made.keywords) + 1 != len(params):
        return None
    body = copy.deepcopy(helper.body)
    if ast.get_docstring(helper) is not None:
        body = body[1:]
    bound = stored(body)
    kept = {p: arg.id for p, arg in given.items() if isinstance(arg, ast.Name) and p not in bound}
    renamed = {p: f"{_PREFIX}{number}_{p}" for p in {*params, *bound} if p not in kept} | kept
    for node in (n for each in body for n in ast.walk(each)):
        if isinstance(node, ast.Name):
            node.id = renamed.get(node.id, node.id)
    first: list[ast.stmt] = [
        ast.copy_location(ast.Assign([ast.Name(renamed[p], ast.Store())], arg), stmt)
        for p, arg in given.items()
        if p not in kept
    ]
    last = body[-1] if body else None
    returned = last.value if isinstance(last, ast.Return) else None
    if returned is None:
        return [*first, *body] if isinstance(stmt, ast.Expr) and stmt.value is made else None
    if in_place_names(body) and not (isinstance(stmt, ast.Assign) and stmt.value is made):
        return None  # what the statement reads beside it would be read too late
    _Swap(made, returned).visit(stmt)
    return [*first, *body[:-1], stmt]


class _Swap(ast.NodeTransformer):
    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)
