"""Conditions that ask whether the item of a loop has rows: `mask.any()`, `(ids == e).sum() == 0`, `e not in ids`."""

from __future__ import annotations

import ast

from moec.capture.events import called, loaded

ASK_MASKS = frozenset(("any", "sum", "count_nonzero"))  # of a mask; a row's number may be 0
ASK_SIZES = frozenset(("numel", "nelement", "size", "len"))


def asks_for_rows(test: ast.expr, aliases: set[str], selected: set[str]) -> bool:
    """Whether a condition asks if there are rows; `selected`: the names of masks and rows that the item selects."""
    for node in ast.walk(test):
        if member_of(node, aliases) is not None:
            return True
        asks = isinstance(node, ast.Call) and called(node) in ASK_MASKS | ASK_SIZES
        if asks and loaded([node]) & (aliases | selected):
            return True
    return bool(loaded([test]) & selected)


def picks_rows(loop: ast.For, selected: set[str]) -> bool:
    """Whether a loop's body takes or writes rows that its item selects: `x[mask]`."""
    return any(isinstance(node, ast.Subscript) and loaded([node.slice]) & selected for node in ast.walk(loop))


def member_of(node: ast.AST, aliases: set[str] | frozenset[str]) -> ast.expr | None:
    """ids of `e in ids` and `e not in ids`."""
    if not isinstance(node, ast.Compare) or len(node.ops) != 1 or not isinstance(node.ops[0], (ast.In, ast.NotIn)):
        return None
    item, held = node.left, node.comparators[0]
    if isinstance(item, ast.Call) and called(item) in ("item", "int"):
        item = item.args[0] if item.args else item.func
        item = item.value if isinstance(item, ast.Attribute) else item
    return held if isinstance(item, ast.Name) and item.id in aliases and isinstance(held, ast.Name) else None
