"""A method or function that a loop's body hands its item to is written out in the body: what it does is then seen.

def run(self, i, rows): return self.experts[i](rows)      y[t] += self.run(e, x[t])   →   y[t] += self.experts[e](x[t])

A helper may hold the whole of a body; where it returns nothing, or zeros that are only added, the iteration ends.
While it is traced, the rolled body asks whether the helper is still the one that was written out: a subclass may have
another.
"""

from __future__ import annotations

import ast
import copy
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moec.capture import source
from moec.capture.events import called, stored
from moec.capture.one_exit import one_exit
from moec.capture.recognise import aliases_of, in_place_names, is_alias, tainted_by
from moec.capture.state import loop_key
from moec.capture.words import call, name

Lookup = Callable[[str], types.FunctionType | None]


@dataclass(frozen=True)
class Known:
    """What a function may call by name: methods of its class, functions of its file."""

    method: Lookup = lambda name: None
    function: Lookup = lambda name: None


_PREFIX = "_moec_in"
_DEPTH = 4  # helpers that call helpers
_LINES = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.If, ast.For, ast.Return, ast.Continue, ast.Pass)
_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.FunctionDef, ast.NamedExpr)
_LEAVES = (ast.Yield, ast.YieldFrom, ast.Await)
_MAYBE = (ast.IfExp, ast.BoolOp, *_SCOPES)


@dataclass(frozen=True)
class _Call:
    """A call in a statement, and the helper that it calls."""

    made: ast.Call
    helper: ast.FunctionDef
    function: types.FunctionType

    @property
    def of(self) -> ast.expr | None:
        """What the helper is a method of, or None."""
        return self.made.func.value if isinstance(self.made.func, ast.Attribute) else None


def written_out(loop: ast.For, owner: ast.FunctionDef, file: str, known: Known) -> ast.For | None:
    """A copy of the loop with its item's helpers written out; None where there are none."""
    own = owner.args.args[0].arg if owner.args.args else ""
    taken = stored(owner.body) | {a.arg for a in ast.walk(owner.args) if isinstance(a, ast.arg)}
    known = Known(_free_of(known.method, taken), _free_of(known.function, taken))
    key = ast.Constant(loop_key(file, loop.lineno))
    out, numbers = copy.deepcopy(loop), itertools.count()
    asked: dict[str, ast.stmt] = {}
    for _ in range(_DEPTH):
        if not _one_level(out, own, file, known, key, numbers, asked):
            break
    if not asked:
        return None
    out.body[:0] = asked.values()
    for node in ast.walk(out):
        if isinstance(node, (ast.expr, ast.stmt)) and not hasattr(node, "lineno"):
            ast.copy_location(node, loop)
    return out


def _free_of(find: Lookup, taken: set[str]) -> Lookup:
    """Only helpers that read none of these names from their file: where they are written out, they would differ."""

    def found(name: str) -> types.FunctionType | None:
        function = find(name)
        read = set() if function is None else set(function.__code__.co_names) & set(function.__globals__)
        return None if read & taken else function

    return found


def _one_level(
    out: ast.For,
    own: str,
    file: str,
    known: Known,
    key: ast.Constant,
    numbers: Iterator[int],
    asked: dict[str, ast.stmt],
) -> bool:
    """Write out the helpers that the statements of a loop call; whether there were any."""
    aliases, tainted, found = aliases_of(out), tainted_by(out), False
    for block, tail in list(_blocks(out)):
        for stmt in list(block):
            made = _helper(stmt, own, aliases, tainted, file, known)
            lines = None if made is None else _lines(stmt, made, next(numbers), tail and stmt is block[-1])
            if made is None or lines is None:
                continue
            place = block.index(stmt)
            block[place : place + 1] = lines
            where = ast.Constant(loop_key(file, made.function.__code__.co_firstlineno))
            obj = name(own) if made.of is not None else name(made.helper.name)
            method = ast.Constant(made.helper.name if made.of is not None else "")
            asked.setdefault(made.helper.name, ast.Expr(call("expects", key, obj, method, where)))
            found = True
    return found


def _blocks(loop: ast.For) -> Iterator[tuple[list[ast.stmt], bool]]:
    """The loop's body and the blocks of the `if`s in it; whether the iteration ends where the block ends."""
    todo = [(loop.body, True)]
    while todo:
        block, tail = todo.pop()
        yield block, tail
        for stmt in block:
            if isinstance(stmt, ast.If):
                todo += [(part, tail and stmt is block[-1]) for part in (stmt.body, stmt.orelse) if part]


def _helper(stmt: ast.stmt, own: str, aliases: set[str], tainted: set[str], file: str, known: Known) -> _Call | None:
    """The one call in a statement that hands the item, or what it selects, to a helper which can be written out."""
    if not isinstance(stmt, (ast.Assign, ast.AugAssign, ast.Expr)):
        return None
    hidden = {id(n) for m in ast.walk(stmt) if isinstance(m, _MAYBE) for n in ast.walk(m)}
    found = [
        made
        for n in ast.walk(stmt.value)
        if isinstance(n, ast.Call) and (made := _resolved(n, own, file, known)) is not None
    ]
    if len(found) != 1 or id(found[0].made) in hidden:
        return None
    given = [*found[0].made.args, *(k.value for k in found[0].made.keywords)]
    params = {a.arg for a in found[0].helper.args.args}
    writes = bool(in_place_names(found[0].helper.body) & params)
    names = {n.id for arg in given for n in ast.walk(arg) if isinstance(n, ast.Name)}
    handed = any(is_alias(arg, aliases) for arg in given) or (writes and bool(names & tainted))
    return found[0] if handed else None


def _resolved(made: ast.Call, own: str, file: str, known: Known) -> _Call | None:
    """The helper that a call calls, where its lines can stand in the place of the call."""
    func = made.func
    if isinstance(func, ast.Attribute):
        of_own = isinstance(func.value, ast.Name) and func.value.id == own
        function = known.method(func.attr) if of_own else None
    else:
        function = known.function(func.id) if isinstance(func, ast.Name) else None
    if function is None or function.__code__.co_filename != file or function.__code__.co_freevars:
        return None
    try:
        helper = source.parse(function.__code__)
    except source.NoSource:
        return None
    return _Call(made, helper, function) if _is_plain(helper) else None


def _is_plain(helper: ast.FunctionDef) -> bool:
    """Whether a helper's lines may stand elsewhere: no decorators, scopes or private names of its own."""
    args = helper.args
    if helper.decorator_list or args.vararg or args.kwarg or args.kwonlyargs or args.posonlyargs:
        return False
    if not all(isinstance(default, ast.Constant) for default in args.defaults):
        return False
    inner = [n for stmt in helper.body for n in ast.walk(stmt)]
    if any(isinstance(n, (*_SCOPES, *_LEAVES)) for n in inner):
        return False
    if any(isinstance(n, ast.Attribute) and n.attr.startswith("__") for n in inner):
        return False
    return all(isinstance(n, _LINES) for n in inner if isinstance(n, ast.stmt))


def _lines(stmt: ast.stmt, found: _Call, number: int, tail: bool) -> list[ast.stmt] | None:
    """The helper's statements, then the statement with what the helper returns in the place of its call.

    tail: whether the iteration ends with the statement, so that a helper that returns nothing ends it too.
    """
    given = _arguments(found)
    if given is None:
        return None
    body = copy.deepcopy(found.helper.body)
    if ast.get_docstring(found.helper) is not None:
        body = body[1:]
    bound = stored(body)
    kept = {p: arg.id for p, arg in given.items() if isinstance(arg, ast.Name) and p not in bound}
    renamed = {p: f"{_PREFIX}{number}_{p}" for p in {*given, *bound} if p not in kept} | kept
    for node in (n for each in body for n in ast.walk(each)):
        if isinstance(node, ast.Name):
            node.id = renamed.get(node.id, node.id)
    first: list[ast.stmt] = [
        ast.copy_location(ast.Assign([ast.Name(renamed[p], ast.Store())], arg), stmt)
        for p, arg in given.items()
        if p not in kept
    ]
    return _with_result(stmt, found.made, [*first, *body], f"{_PREFIX}{number}_", tail)


def _with_result(
    stmt: ast.stmt, made: ast.Call, body: list[ast.stmt], result: str, tail: bool
) -> list[ast.stmt] | None:
    """The lines of a helper with one exit, then the statement that reads what is returned there."""
    alone = isinstance(stmt, ast.Expr) and stmt.value is made
    nothing = _adds_nothing if _only_adds(stmt, made) else _is_none if alone else None
    lines = one_exit(body, result, nothing if tail else None)
    if lines is None:
        return None
    last = lines[-1] if lines else None
    whole = isinstance(last, ast.Assign) and isinstance(last.targets[0], ast.Name) and last.targets[0].id == result
    straight = whole and not any(result in stored([line]) for line in lines[:-1])
    if alone:
        return lines[:-1] if straight and isinstance(last, ast.Assign) and _is_none(last.value) else lines
    if in_place_names(body) and not (isinstance(stmt, ast.Assign) and stmt.value is made):
        return None  # what the statement reads beside it would be read too late
    returned = last.value if straight and isinstance(last, ast.Assign) else name(result)
    _Swap(made, returned).visit(stmt)
    return [*(lines[:-1] if straight else lines), stmt]


def _arguments(found: _Call) -> dict[str, ast.expr] | None:
    """What each parameter of the helper is given; None where that is not plain."""
    args = found.helper.args
    params = [a.arg for a in args.args]
    placed = [*([found.of] if found.of is not None else []), *found.made.args]
    named = {k.arg: k.value for k in found.made.keywords if k.arg is not None}
    if len(placed) > len(params) or len(named) != len(found.made.keywords) or set(named) & set(params[: len(placed)]):
        return None
    if any(isinstance(arg, ast.Starred) for arg in placed):
        return None
    defaults = dict(zip(params[len(params) - len(args.defaults) :], args.defaults, strict=True))
    given = {**defaults, **dict(zip(params, placed, strict=False)), **named}
    return given if set(given) == set(params) else None


def _only_adds(stmt: ast.stmt, made: ast.Call) -> bool:
    """`y += helper(…)` and `y = y + helper(…)`."""
    if isinstance(stmt, ast.AugAssign):
        return isinstance(stmt.op, ast.Add) and stmt.value is made
    if not isinstance(stmt, ast.Assign) or len(stmt.targets) != 1 or not isinstance(stmt.value, ast.BinOp):
        return False
    old = {id(side): ast.unparse(side) for side in (stmt.value.left, stmt.value.right) if side is not made}
    return isinstance(stmt.value.op, ast.Add) and list(old.values()) == [ast.unparse(stmt.targets[0])]


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _adds_nothing(value: ast.expr) -> bool:
    """Zeros, however they are made."""
    if isinstance(value, ast.Call):
        return called(value) in ("zeros", "zeros_like", "new_zeros")
    return isinstance(value, ast.Constant) and type(value.value) in (int, float) and value.value == 0


class _Swap(ast.NodeTransformer):
    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)
