"""Source that differs in one thing: mutants of a module's text, for what a captured graph no longer shows (loops)."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

FUNCTIONS = {
    "silu": "gelu",
    "gelu": "relu",
    "relu": "silu",
    "any": "all",
    "argsort": "cumsum",
    "zeros_like": "ones_like",
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Mult: ast.Add,
    ast.Add: ast.Mult,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mod,
    ast.Sub: ast.Add,
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Eq: ast.NotEq, ast.Gt: ast.GtE, ast.LtE: ast.Lt}
WHERE = ("forward", "route", "phi", "act")


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """(what was changed, the source) for every change in the functions of WHERE."""
    tree = ast.parse(source)
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in WHERE):
        names = sorted({n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)})
        for node in ast.walk(function):
            for what, field, new in _changes(node, names):
                old = getattr(node, field)
                setattr(node, field, new)
                yield f"{function.name}:{getattr(node, 'lineno', 0)} {what}", ast.unparse(tree)
                setattr(node, field, old)
        yield from _statements(tree, function)


def _changes(node: ast.AST, names: list[str]) -> Iterator[tuple[str, str, object]]:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} → {not node.value}", "value", not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        for new in (node.value + 1, node.value - 1):
            yield f"{node.value} → {new}", "value", new
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield f"{node.value} → 0.5", "value", 0.5
    elif isinstance(node, ast.Attribute) and node.attr in FUNCTIONS:
        yield f"{node.attr} → {FUNCTIONS[node.attr]}", "attr", FUNCTIONS[node.attr]
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        new = OPERATORS[type(node.op)]
        yield f"{type(node.op).__name__} → {new.__name__}", "op", new()
        yield "operands exchanged", "left", node.right
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield "another comparison", "ops", [COMPARISONS[type(node.ops[0])]()]
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        if node.id in ("E", "K"):
            yield f"{node.id} - 1", "id", f"({node.id} - 1)"
        for other in names:
            if other != node.id and node.id in names:
                yield f"{node.id} → {other}", "id", other


def _statements(tree: ast.Module, function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """A statement left out, or run twice."""
    for parent in ast.walk(function):
        body = getattr(parent, "body", None)
        if not isinstance(body, list):
            continue
        for i, statement in enumerate(list(body)):
            if isinstance(statement, ast.Return):
                continue
            removed = body.pop(i)
            if body:
                yield f"{function.name}:{statement.lineno} left out", ast.unparse(tree)
            body.insert(i, removed)
            body.insert(i, copy.deepcopy(statement))
            yield f"{function.name}:{statement.lineno} twice", ast.unparse(tree)
            body.pop(i)
