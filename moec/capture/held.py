"""A list that holds something for each expert, made before the loop that reads it: the loop makes its own entry.

rows = [torch.where(chosen == j) for j in range(E)]
for e in range(E):                                    →   for e in range(E):
    t, s = rows[e]                                            t, s = torch.where(chosen == e)

`for e, (t, s) in enumerate(rows)` and `zip(experts, rows)` too. Only a list that is read in one loop, where its entry
is computed once, and made of what nobody changes before its entry is read. It may be made of another one's entries.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from typing import TypeVar

from moec.capture.events import loaded, statements, stored
from moec.capture.recognise import in_place_names

_Node = TypeVar("_Node", bound=ast.AST)

_PLACE = "_moec_place"
_LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.FunctionDef)


def held(node: ast.FunctionDef) -> ast.FunctionDef:
    """The function, changed in place; it computes what it did."""
    while any(_moved(node, stmt, path[-1][1], path[-1][2]) for stmt, path in list(statements(node))):
        pass
    return node


def _moved(function: ast.FunctionDef, stmt: ast.stmt, block: list[ast.stmt], place: int) -> bool:
    """Whether the statement was a list for each expert, which the one loop that reads it now makes itself."""
    made = _one_for_each(stmt)
    if made is None or not isinstance(stmt, ast.Assign):
        return False
    listed, rest = ast.unparse(stmt.targets[0]), block[place + 1 :]
    uses = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == listed]
    reads = [n for n in uses if isinstance(n.ctx, ast.Load)]
    loop = next((s for s in rest if isinstance(s, ast.For) and any(n in reads for n in ast.walk(s))), None)
    if not reads or len(uses) != len(reads) + 1 or loop is None or loop.orelse:
        return False
    until = rest[: rest.index(loop) + 1]
    if (stored(until) | in_place_names(until)) & (loaded([stmt.value]) - stored([made.generators[0].target])):
        return False
    if not (_by_subscript(loop, made, reads) or (len(reads) == 1 and _by_iteration(loop, made, reads[0]))):
        return False
    del block[place]
    return True


def _one_for_each(stmt: ast.stmt) -> ast.ListComp | None:
    """`name = [f(j) for j in range(n)]`."""
    if not isinstance(stmt, ast.Assign) or len(stmt.targets) != 1 or not isinstance(stmt.targets[0], ast.Name):
        return None
    made = stmt.value
    if not isinstance(made, ast.ListComp) or len(made.generators) != 1:
        return None
    each = made.generators[0]
    counts = isinstance(each.target, ast.Name) and not each.ifs and not each.is_async and _range(each.iter) is not None
    return made if counts and not any(isinstance(n, (*_LOOPS, ast.NamedExpr)) for n in ast.walk(made.elt)) else None


def _range(expr: ast.expr) -> str | None:
    """The end of a `range` from 0, as text."""
    call = isinstance(expr, ast.Call) and isinstance(expr.func, ast.Name) and expr.func.id == "range"
    return ast.unparse(expr.args[0]) if call and isinstance(expr, ast.Call) and len(expr.args) == 1 else None


def _by_subscript(loop: ast.For, made: ast.ListComp, reads: list[ast.Name]) -> bool:
    """`rows[e]` in a loop over the same places; where it stands more than once, the entry is made first."""
    place = _place(loop, made)
    inner = {id(n) for s in ast.walk(ast.Module(loop.body, [])) if isinstance(s, _LOOPS) for n in ast.walk(s)}
    at = [n for n in ast.walk(loop) if isinstance(n, ast.Subscript) and n.value in reads and id(n) not in inner]
    if place is None or len(at) != len(reads) or any(ast.unparse(n.slice) != place for n in at):
        return False
    entry = _entry(made, place)
    if len(at) > 1:
        first = ast.Assign([ast.Name(f"_moec_held_{reads[0].id}", ast.Store())], entry)
        loop.body.insert(0, _at(first, made))
        entry = _at(ast.Name(f"_moec_held_{reads[0].id}", ast.Load()), made)
    for read in at:
        _Swap(read, copy.deepcopy(entry)).visit(loop)
    return True


def _place(loop: ast.For, made: ast.ListComp) -> str | None:
    """The name of the place that a loop is at, which its body does not bind anew."""
    target: ast.expr | None = None
    if _range(loop.iter) is not None and _range(loop.iter) == _range(made.generators[0].iter):
        target = loop.target
    elif _called(loop.iter, "enumerate", 1) and isinstance(loop.target, ast.Tuple) and len(loop.target.elts) == 2:
        target = loop.target.elts[0]
    return target.id if isinstance(target, ast.Name) and target.id not in stored(loop.body) else None


def _called(expr: ast.expr, name: str, args: int) -> bool:
    call = isinstance(expr, ast.Call) and isinstance(expr.func, ast.Name) and expr.func.id == name
    plain = isinstance(expr, ast.Call) and all(k.arg == "strict" for k in expr.keywords)
    return call and plain and isinstance(expr, ast.Call) and len(expr.args) == args


def _by_iteration(loop: ast.For, made: ast.ListComp, read: ast.Name) -> bool:
    """`for t in rows`, `for e, t in enumerate(rows)`, `for expert, t in zip(experts, rows)`."""
    each = made.generators[0]
    items, target = loop.iter, loop.target
    place: ast.expr = ast.Name(_PLACE, ast.Store())
    if _called(items, "enumerate", 1) and isinstance(target, ast.Tuple) and len(target.elts) == 2:
        assert isinstance(items, ast.Call)
        items, (place, target) = items.args[0], target.elts
    if not isinstance(place, ast.Name) or place.id in stored(loop.body):
        return False
    if items is read:
        others: list[tuple[ast.expr, ast.expr]] = []
    elif _called(items, "zip", 2) and isinstance(items, ast.Call) and read in items.args:
        if not isinstance(target, ast.Tuple) or len(target.elts) != 2:
            return False
        pairs = list(zip(target.elts, items.args, strict=True))
        others = [pair for pair in pairs if pair[1] is not read]
        target = next(part for part, sequence in pairs if sequence is read)
    else:
        return False
    loop.iter, loop.target = each.iter, place
    if others:
        assert isinstance(items, ast.Call)
        joint = ast.Call(ast.Name("zip", ast.Load()), [each.iter, others[0][1]], items.keywords)
        loop.iter = _at(joint, each.iter)
        loop.target = ast.Tuple([place, others[0][0]], ast.Store())
    loop.body.insert(0, _at(ast.Assign([target], _entry(made, place.id)), made))
    for node in (place, loop.target):
        _at(node, made)
    return True


def _entry(made: ast.ListComp, place: str) -> ast.expr:
    """What the list holds at a place."""
    item = made.generators[0].target
    assert isinstance(item, ast.Name)
    entry = copy.deepcopy(made.elt)
    for node in ast.walk(entry):
        if isinstance(node, ast.Name) and node.id == item.id:
            node.id = place
    return entry


def _at(node: _Node, like: ast.expr) -> _Node:
    for each in _unplaced(node):
        ast.copy_location(each, like)
    return node


def _unplaced(node: ast.AST) -> Iterator[ast.AST]:
    return (n for n in ast.walk(node) if isinstance(n, (ast.expr, ast.stmt)) and not hasattr(n, "lineno"))


class _Swap(ast.NodeTransformer):
    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)
