"""A loop over experts beside a loop over a token's choices, one inside the other: the loop over experts comes inside.

for e in experts: mask; for s in range(k): y[rows(e, s)] += …   →   for s in range(k): for e in experts: mask; …

What is added is the same, in another order. Each turn of the outer loop is then a loop over experts of its own.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass

from moec.capture.branches import only_adds
from moec.capture.events import Path, loaded, stored
from moec.capture.recognise import aliases_of, is_alias, tainted_by


@dataclass(frozen=True)
class Exchanged:
    """`holder` runs over a token's choices, `loop` stands in it and runs over experts; `path`: to what was written."""

    path: Path
    holder: ast.For
    loop: ast.For

    @property
    def loop_path(self) -> Path:
        """The way to the loop as if its holder stood in the function."""
        return (*self.path, (self.holder, self.holder.body, 0))


def exchanged(loop: ast.For, path: Path) -> Exchanged | None:
    """The loop with the one inside it outside, where that changes nothing but the order of turns."""
    *before, inner = loop.body
    if not isinstance(inner, ast.For) or inner.orelse or loop.orelse or picks(inner) >= max(picks(loop), 1):
        return None
    leaves = (ast.Break, ast.Return, ast.Yield, ast.YieldFrom, ast.Await)
    if any(isinstance(node, leaves) for node in ast.walk(loop)) or not all(map(_only_binds, before)):
        return None
    if not only_adds(inner.body):
        return None
    own, theirs = stored([*before, loop.target]), stored([inner])
    if loaded([inner.iter]) & tainted_by(loop) or own & theirs or loaded([*before, loop.iter]) & theirs:
        return None
    turned = ast.For(loop.target, loop.iter, copy.deepcopy([*before, *inner.body]), [])
    holder = ast.For(inner.target, inner.iter, [ast.copy_location(turned, loop)], [])
    return Exchanged(path, ast.copy_location(holder, loop), turned)


def _only_binds(stmt: ast.stmt) -> bool:
    """Whether a statement may run once for each turn of the other loop: it binds names, or ends the turn."""
    if isinstance(stmt, ast.If):
        return not stmt.orelse and len(stmt.body) == 1 and isinstance(stmt.body[0], ast.Continue)
    if not isinstance(stmt, ast.Assign) or any(isinstance(n, ast.NamedExpr) for n in ast.walk(stmt)):
        return False
    names = all(isinstance(n, (ast.Name, ast.Tuple, ast.List)) for target in stmt.targets for n in _parts(target))
    in_place = any(isinstance(n, ast.Attribute) and n.attr.endswith("_") for n in ast.walk(stmt.value))
    return names and not in_place


def _parts(target: ast.expr) -> list[ast.expr]:
    return [target, *target.elts] if isinstance(target, (ast.Tuple, ast.List)) else [target]


def inner_experts(loop: ast.For, inner: ast.For) -> bool:
    """Whether not the loop, but one inside it runs over experts."""
    return picks(inner) > picks(loop)


def picks(loop: ast.For) -> int:
    """How much a loop looks like one over experts: 2 where its item picks what is called, or a part of a module;
    1 where its item is compared with something; 0 where neither.
    """
    names = aliases_of(loop)
    beside = stored([loop.target]) - names
    compared = False
    for node in ast.walk(ast.Module(loop.body, [])):
        if isinstance(node, ast.Call):
            root = _root(node.func)
            if isinstance(root, ast.Name) and root.id in beside | (names if root is node.func else set()):
                return 2
            compared = compared or (any(is_alias(arg, names) for arg in node.args) and _is_eq(node.func))
        if isinstance(node, ast.Subscript) and is_alias(node.slice, names) and isinstance(node.value, ast.Attribute):
            return 2
        if isinstance(node, ast.Compare):
            compared = compared or any(is_alias(side, names) for side in (node.left, *node.comparators))
    return int(compared)


def _root(expr: ast.expr) -> ast.expr:
    while isinstance(expr, (ast.Attribute, ast.Subscript)):
        expr = expr.value
    return expr


def _is_eq(func: ast.expr) -> bool:
    return isinstance(func, ast.Attribute) and func.attr in ("eq", "ne")
