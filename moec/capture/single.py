"""A function whose assignments each bind one name: what comes after looks at those alone.

outs, start = [], 0      →   outs = []; start = 0
outs: list[Tensor] = []  →   outs = []
"""

from __future__ import annotations

import ast

from moec.capture.events import loaded


def single(node: ast.FunctionDef) -> ast.FunctionDef:
    """The function, changed in place; it does what it did."""
    return _Single().visit(node)


class _Single(ast.NodeTransformer):
    def visit_Assign(self, node: ast.Assign) -> ast.stmt | list[ast.stmt]:
        target, value = node.targets[0], node.value
        if len(node.targets) > 1 or not isinstance(target, ast.Tuple) or not isinstance(value, ast.Tuple):
            return node
        names = [each.id for each in target.elts if isinstance(each, ast.Name)]
        starred = any(isinstance(each, ast.Starred) for each in value.elts)
        if starred or not len(names) == len(target.elts) == len(value.elts):
            return node
        if any(name in loaded(value.elts[place + 1 :]) for place, name in enumerate(names)):
            return node  # a, b = b, a
        pairs = zip(target.elts, value.elts, strict=True)
        return [ast.copy_location(ast.Assign([name], part), node) for name, part in pairs]

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        # What a local is annotated with is never evaluated.
        if node.value is None or not isinstance(node.target, ast.Name) or not node.simple:
            return node
        return ast.copy_location(ast.Assign([node.target], node.value), node)
