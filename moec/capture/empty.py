"""An `if` that asks whether there are rows, where all it does is to write at those rows: without it nothing changes.

for k in range(K):                          for k in range(K):
    m = ids[:, k] == e                          m = ids[:, k] == e
    if m.any():                        →        y[m] += w[m, k, None] * rows[m[mine]]
        y[m] += w[m, k, None] * …

A rolled body is traced once, so such an `if` could end an iteration, but not stand in a loop or before other lines.
Only what torch itself computes stands inside: an expert is not called where it was not.
"""

from __future__ import annotations

import ast
import copy

from moec.capture.asks import ASK_MASKS, ASK_SIZES
from moec.capture.events import called, loaded, stored
from moec.capture.words import call, name

_SAME = frozenset(("item", "bool", "int"))
_PLACES = frozenset(("where", "nonzero", "argwhere", "flatten", "squeeze"))
_VIEWS = ("unsqueeze", "view", "view_as", "reshape", "expand", "expand_as", "contiguous", "detach")
_CASTS = ("to", "type_as", "type", "float", "half", "bfloat16", "long")
_PURE = _PLACES | frozenset((*_VIEWS, *_CASTS, "sum", "mul", "index_select", "gather"))
_ADDS = frozenset(("index_add_", "index_copy_"))


def unguarded(loop: ast.For, tainted: frozenset[str], key: ast.Constant) -> ast.For:
    """A copy of a loop without such an `if` in its body, where it could not end an iteration."""
    out = copy.deepcopy(loop)
    _unguard(out.body, out, tainted, key, True)
    return out


def _unguard(block: list[ast.stmt], loop: ast.For, tainted: frozenset[str], key: ast.Constant, ends: bool) -> None:
    for stmt in list(block):
        last = ends and stmt is block[-1]
        if isinstance(stmt, ast.For):
            _unguard(stmt.body, loop, tainted, key, False)
        if not isinstance(stmt, ast.If):
            continue
        for part in (stmt.body, stmt.orelse):
            _unguard(part, loop, tainted, key, last)
        asked, asks = _asked(stmt.test)
        if not last and asked in tainted and asks and _vanishes(stmt, asked, loop):
            place = block.index(stmt)
            mask = [ast.Expr(call("expects_mask", key, name(asked)))] if asks & ASK_MASKS else []
            block[place : place + 1] = [*mask, *stmt.body]


def _vanishes(stmt: ast.If, asked: str, loop: ast.For) -> bool:
    """Whether what an `if` does is nothing where the rows that it asks for are none."""
    if stmt.orelse or not all(_is_pure(inner) for inner in stmt.body):
        return False
    empty = {asked}
    for inner in stmt.body:
        if (
            isinstance(inner, ast.Assign)
            and len(inner.targets) == 1
            and not isinstance(inner.targets[0], ast.Subscript)
        ):
            if asked in stored([inner]):
                return False
            empty |= stored([inner]) if _are_places(inner.value, empty) else set()
        elif not _writes_at(inner, empty):
            return False
    bound = stored(stmt.body)
    inside = {id(node) for inner in stmt.body for node in ast.walk(inner)}
    others = (n for n in ast.walk(loop) if isinstance(n, ast.Name) and id(n) not in inside)
    return bound.isdisjoint(n.id for n in others)


def _asked(test: ast.expr) -> tuple[str, set[str]]:
    """The name of the mask or of the rows of which a condition says that there are some, and the words that say it."""
    asks: set[str] = set()
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.comparators[0], ast.Constant):
        if (type(test.ops[0]), test.comparators[0].value) not in ((ast.Gt, 0), (ast.NotEq, 0), (ast.GtE, 1)):
            return "", asks
        test = test.left
    while not isinstance(test, ast.Name):
        inner = behind_shape(test) if isinstance(test, ast.Subscript) else _behind_call(test)
        if inner is None:
            return "", asks
        asks |= {called(test) or "size"} - _SAME
        test = inner
    return test.id, asks


def behind_shape(test: ast.Subscript) -> ast.expr | None:
    """rows of `rows.shape[0]`."""
    first = isinstance(test.slice, ast.Constant) and test.slice.value == 0
    return test.value.value if first and isinstance(test.value, ast.Attribute) and test.value.attr == "shape" else None


def _behind_call(test: ast.expr) -> ast.expr | None:
    """rows of `rows.any()`, `rows.size(0)`, `torch.any(rows)`, `len(rows)`."""
    if not isinstance(test, ast.Call) or test.keywords or called(test) not in ASK_MASKS | ASK_SIZES | _SAME:
        return None
    if isinstance(test.func, ast.Attribute) and not _is_torch(test.func.value):
        zero = [isinstance(arg, ast.Constant) and arg.value == 0 for arg in test.args]
        return test.func.value if zero == ([True] if test.func.attr == "size" else []) else None
    return test.args[0] if len(test.args) == 1 else None


def _are_places(value: ast.expr, empty: set[str]) -> bool:
    """`torch.where(mask)[0]`, `mask.nonzero().squeeze(1)`: none where the mask is empty."""
    made = [node for node in ast.walk(value) if isinstance(node, ast.Call)]
    only = all(isinstance(n, (ast.Call, ast.Attribute, ast.Subscript, ast.Name, *_LEAVES)) for n in ast.walk(value))
    names = loaded([value]) - {"torch"}
    return bool(made) and only and len(names) == 1 and names <= empty and all(called(n) in _PLACES for n in made)


_LEAVES = (ast.Constant, ast.keyword, ast.expr_context, ast.UnaryOp, ast.USub)


def _writes_at(stmt: ast.stmt, empty: set[str]) -> bool:
    """`y[rows] += …`, `y[rows] = …`, `y.index_add_(0, rows, …)`."""
    if isinstance(stmt, (ast.Assign, ast.AugAssign)):
        target = stmt.targets[0] if isinstance(stmt, ast.Assign) else stmt.target
        if not isinstance(target, ast.Subscript):
            return False
        first = target.slice.elts[0] if isinstance(target.slice, ast.Tuple) and target.slice.elts else target.slice
        return isinstance(first, ast.Name) and first.id in empty
    if not isinstance(stmt, ast.Expr) or not isinstance(stmt.value, ast.Call) or called(stmt.value) not in _ADDS:
        return False
    index = stmt.value.args[1] if len(stmt.value.args) > 1 else None
    return isinstance(index, ast.Name) and index.id in empty


def _is_pure(stmt: ast.stmt) -> bool:
    """Whether all that a statement calls are words of torch without effects, beside the write that it may be."""
    own = stmt.value if isinstance(stmt, ast.Expr) else None
    calls = [n for n in ast.walk(stmt) if isinstance(n, ast.Call) and n is not own]
    return all(isinstance(n.func, ast.Attribute) and n.func.attr in _PURE for n in calls)


def _is_torch(expr: ast.expr) -> bool:
    return isinstance(expr, ast.Name) and expr.id == "torch"
