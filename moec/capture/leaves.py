"""Zeros that ask for a gradient, `torch.zeros(n, requires_grad=True)`, which Dynamo breaks a graph at.

Where such a tensor is only what a functional operation starts from, nothing can read its gradient, and it is traced as
plain zeros.
"""

from __future__ import annotations

import ast

from moec.capture.words import call

_FRESH = frozenset(("zeros", "zeros_like", "full", "full_like", "ones", "ones_like"))
_FUNCTIONAL = frozenset(("scatter", "scatter_add", "index_add", "index_put", "index_copy", "masked_scatter"))


def without_leaves(function: ast.FunctionDef) -> bool:
    """Have the function ask for no such gradient where it is traced, in place; whether there was one."""
    found = False
    for asked in _received(function):
        asked.value = call("eager")
        found = True
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            continue
        asked = _asked(node.value)
        if asked is not None and _only_begins(function, node.targets[0].id):
            asked.value = call("eager")
            found = True
    return found


def _received(function: ast.FunctionDef) -> list[ast.keyword]:
    """The keywords of `torch.zeros(…, requires_grad=True).scatter(…)`, where nothing else can see the zeros."""
    calls = [n.func for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    asked = [_asked(func.value) for func in calls if func.attr in _FUNCTIONAL]
    return [keyword for keyword in asked if keyword is not None]


def asks(names: tuple[object, ...]) -> bool:
    """Whether the constants of some bytecode name the keyword."""
    return any(isinstance(held, tuple) and "requires_grad" in held for held in names)


def _asked(value: ast.expr) -> ast.keyword | None:
    """The keyword of `torch.zeros(…, requires_grad=True)`."""
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute) or value.func.attr not in _FRESH:
        return None
    if not isinstance(value.func.value, ast.Name) or value.func.value.id != "torch":
        return None
    true = (k for k in value.keywords if isinstance(k.value, ast.Constant) and k.value.value is True)
    return next((k for k in true if k.arg == "requires_grad"), None)


def _only_begins(function: ast.FunctionDef, name: str) -> bool:
    """Whether each use of a name is as what a functional operation adds to: `zeros.scatter(…)`."""
    uses = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == name]
    fine: set[int] = set()
    for node in ast.walk(function):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr in _FUNCTIONAL:
            fine.add(id(node.func.value))
            torch_call = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            fine |= {id(arg) for arg in node.args[:1] if torch_call}
    return all(isinstance(n.ctx, ast.Store) or id(n) in fine for n in uses)
