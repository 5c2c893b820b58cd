"""The order in which Python code reads and binds names: for liveness and for values carried around a loop."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Event(NamedTuple):
    """A name read (`store` false) or bound (`store` true)."""

    name: str
    store: bool


_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def events(nodes: Iterable[ast.AST]) -> Iterator[Event]:
    """Reads and bindings of names in evaluation order; branches one after the other."""
    for node in nodes:
        yield from _events(node)


def _events(node: ast.AST) -> Iterator[Event]:
    if isinstance(node, ast.Name):
        yield Event(node.id, isinstance(node.ctx, (ast.Store, ast.Del)))
    elif isinstance(node, ast.Assign):
        yield from events([node.value, *node.targets])
    elif isinstance(node, ast.AugAssign):
        if isinstance(node.target, ast.Name):
            yield Event(node.target.id, False)
        yield from events([node.value, node.target])
    elif isinstance(node, ast.AnnAssign):
        yield from events([node.value, node.target] if node.value else [])
    elif isinstance(node, ast.NamedExpr):
        yield from events([node.value, node.target])
    elif isinstance(node, (ast.For, ast.AsyncFor)):
        yield from events([node.iter, node.target, *node.body, *node.orelse])
    elif isinstance(node, _COMPREHENSIONS):
        own = {name for gen in node.generators for name, store in events([gen.target]) if store}
        yield from (e for e in _children(node) if e.name not in own)
    elif isinstance(node, _FUNCTIONS):
        inner = list(_children(node))
        yield from (Event(e.name, False) for e in inner if not e.store)
        if not isinstance(node, ast.Lambda):
            yield Event(node.name, True)
    else:
        yield from _children(node)


def _children(node: ast.AST) -> Iterator[Event]:
    return events(ast.iter_child_nodes(node))


def called(expr: ast.AST) -> str:
    """The name of the function or method that an expression calls; empty where it calls none by name."""
    func = expr.func if isinstance(expr, ast.Call) else None
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def stored(nodes: Iterable[ast.AST]) -> set[str]:
    """The names that the code binds."""
    return {e.name for e in events(nodes) if e.store}


def loaded(nodes: Iterable[ast.AST]) -> set[str]:
    """The names that the code reads."""
    return {e.name for e in events(nodes) if not e.store}


def read_first(nodes: Iterable[ast.AST]) -> set[str]:
    """The names that the code may read before it has bound them: live on entry."""
    bound: set[str] = set()
    live: set[str] = set()
    for name, store in events(nodes):
        if store:
            bound.add(name)
        elif name not in bound:
            live.add(name)
    return live


Path = tuple[tuple[ast.AST, list[ast.stmt], int], ...]
"""From the function down to a statement: (owner, block, place in the block)."""


def after(path: Path) -> list[ast.AST]:
    """What may run after the statement at the end of `path`, in order; a loop around it runs its body again."""
    rest: list[ast.AST] = []
    for owner, block, place in reversed(path):
        rest += block[place + 1 :]
        if isinstance(owner, (ast.For, ast.AsyncFor)):
            rest += [owner.target, *owner.body, *owner.orelse]
        elif isinstance(owner, ast.While):
            rest += [owner.test, *owner.body, *owner.orelse]
        elif isinstance(owner, ast.Try):
            rest += [*owner.handlers, *owner.orelse, *owner.finalbody]
    return rest


def functions(function: ast.FunctionDef) -> list[ast.FunctionDef]:
    """The function and those defined inside it."""
    return [node for node in ast.walk(function) if isinstance(node, ast.FunctionDef)]


def loops(function: ast.FunctionDef) -> Iterator[tuple[ast.For, Path]]:
    """The `for` loops of a function, outermost first, with the way to each; not those of functions inside it."""
    yield from ((stmt, path) for stmt, path in statements(function) if isinstance(stmt, ast.For))


def nested(loop: ast.For | ast.While) -> set[int]:
    """The nodes of the loops inside a loop, by identity: what breaks or continues there does not concern the loop."""
    inner = (n for n in ast.walk(loop) if n is not loop and isinstance(n, (ast.For, ast.While)))
    return {id(node) for each in inner for node in ast.walk(each)}


def statements(function: ast.FunctionDef | ast.For) -> Iterator[tuple[ast.stmt, Path]]:
    """The statements of a function or loop, outer ones first, with the way to each; not of functions inside it."""
    yield from _statements(function, ())


def _statements(owner: ast.AST, path: Path) -> Iterator[tuple[ast.stmt, Path]]:
    for _, block in ast.iter_fields(owner):
        if not isinstance(block, list):
            continue
        for place, stmt in enumerate(block):
            if isinstance(stmt, (*_FUNCTIONS, ast.ClassDef)) or not isinstance(stmt, (ast.stmt, ast.ExceptHandler)):
                continue
            here: Path = (*path, (owner, block, place))
            if isinstance(stmt, ast.stmt):
                yield stmt, here
            yield from _statements(stmt, here)
