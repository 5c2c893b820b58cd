"""One function's code with its loops over experts rolled: `if enter(key): rolled else: loop as written`."""

from __future__ import annotations

import ast
import dis
import types
from collections.abc import Iterator
from dataclasses import dataclass

from moec.capture import source
from moec.capture.asks import ASK_MASKS
from moec.capture.comprehend import unfolded
from moec.capture.counted import counted
from moec.capture.events import Path, functions, loops, statements
from moec.capture.held import held
from moec.capture.helpers import Known, written_out
from moec.capture.host import ASKING, counts, hands_over, keep_on_device, lists_rows, scope_of, sized_by_data
from moec.capture.leaves import asks, without_leaves
from moec.capture.nested import Exchanged, exchanged, inner_experts
from moec.capture.rebinds import WRITES
from moec.capture.recognise import Candidate, Declined, examine
from moec.capture.roll import rolled
from moec.capture.single import single
from moec.capture.slices import JOINING
from moec.capture.state import NotRolled, loop_key
from moec.capture.words import RUNTIME, Unrollable, call
from moec.capture.zeros import without_zeros

_FOR = dis.opmap["FOR_ITER"]
_BACK = frozenset(op for name, op in dis.opmap.items() if "BACKWARD" in name)  # a `while`
_LOOPING = _BACK | {_FOR}
_STORE = dis.opmap["STORE_SUBSCR"]
_LISTED = frozenset((dis.opmap["LIST_APPEND"], dis.opmap["MAP_ADD"]))
_WRITES = frozenset(f"{word}{end}" for word in WRITES for end in ("", "_"))
_ASKS = ASK_MASKS | {"unique"}
_NOTHING = Known()


@dataclass(frozen=True)
class Rewritten:
    """What came out: the new code, or None where no loop is rolled; and the loops that stay, with reasons."""

    code: types.CodeType | None
    declined: tuple[NotRolled, ...] = ()


@dataclass(frozen=True)
class _Found:
    """A loop, the function that it stands in, the way to it, and what was made of it."""

    function: ast.FunctionDef
    loop: ast.For
    path: Path
    verdict: Candidate | Declined | None
    instead: ast.stmt | None = None  # the statement that the loop, with what its holder holds, is written out from
    turned: Exchanged | None = None  # the loop with the one inside it outside


def promising(code: types.CodeType) -> bool:
    """The cheap test, on bytecode alone: a `for` and an indexed write, a list that is joined or a question whether a
    mask has rows, in one function; or numbers that are moved to the host, or counted.
    """
    ops = code.co_code[::2]
    if "tolist" in code.co_names or sized_by_data(code.co_names) or asks(code.co_consts):
        return True
    if not (JOINING | ASKING).isdisjoint(code.co_names) and _lists(code):
        return True
    if not _LOOPING.isdisjoint(ops) and (_stores(code) or not _ASKS.isdisjoint(code.co_names)):
        return True
    return any(promising(const) for const in code.co_consts if isinstance(const, types.CodeType))


def promising_by(code: types.CodeType, known: Known) -> bool:
    """The same where the write stands in a helper that is called in a loop."""
    if _LOOPING.isdisjoint(code.co_code[::2]):
        return False
    called = (find(name) for name in code.co_names for find in (known.method, known.function))
    return any(_stores(function.__code__) for function in called if function is not None)


def _stores(code: types.CodeType) -> bool:
    return _STORE in code.co_code[::2] or not _WRITES.isdisjoint(code.co_names)


def _lists(code: types.CodeType) -> bool:
    """Whether a list is made piece by piece; comprehensions are functions of their own before Python 3.12."""
    codes = (code, *(const for const in code.co_consts if isinstance(const, types.CodeType)))
    return any(
        not _LISTED.isdisjoint(c.co_code[::2]) or (_FOR in c.co_code[::2] and "append" in c.co_names) for c in codes
    )


def rewrite(code: types.CodeType, known: Known = _NOTHING) -> Rewritten:
    """The code with its loops over experts rolled; `known`: the helpers that it may call."""
    line = code.co_firstlineno
    try:
        node = held(counted(single(source.parse(code))))
    except source.NoSource as error:
        return Rewritten(None, (NotRolled(str(error), code.co_filename, line),))
    found = [one for owner in functions(node) for one in _candidates(owner, code.co_filename, known)]
    handing = "numbers" if hands_over(node) else "rows" if lists_rows(node) else "counts" if counts(node) else ""
    leaves = without_leaves(node)
    if not any(one.verdict for one in found) and not handing and not leaves:
        return Rewritten(None)
    try:
        if not source.same_code(source.compile_like(code, source.parse(code)), code):
            raise source.NoSource("its source is not the one that its code was compiled from")
        return _roll_all(code, node, found, handing, leaves)
    except source.NoSource as error:
        return Rewritten(None, (NotRolled(str(error), code.co_filename, line),))


def _candidates(owner: ast.FunctionDef, file: str, known: Known) -> Iterator[_Found]:
    scope = scope_of(owner)
    for loop, path in loops(owner):
        helped = written_out(loop, owner, file, known)
        helped = without_zeros(helped or loop) or helped
        if helped is not None:
            holder = ast.If(ast.Constant(True), [helped], [])
            where: Path = (*path, (holder, holder.body, 0))
            verdict = examine(helped, where, scope)
            if isinstance(verdict, Candidate):
                yield _Found(owner, helped, where, verdict, loop)
                continue
        turned = exchanged(loop, path)
        verdict = examine(turned.loop, turned.loop_path, scope) if turned is not None else None
        if turned is not None and isinstance(verdict, Candidate):
            yield _Found(owner, loop, path, verdict, turned=turned)
            continue
        verdict = examine(loop, path, scope)
        inner = [examine(node, where, scope) for node, where in _inside(loop, path) if inner_experts(loop, node)]
        if not any(isinstance(one, Candidate) for one in inner):
            yield _Found(owner, loop, path, verdict)
    for one in unfolded(owner):
        yield _Found(owner, one.loop, one.loop_path, examine(one.loop, one.loop_path, scope), one.stmt)


def _inside(loop: ast.For, path: Path) -> Iterator[tuple[ast.For, Path]]:
    """The loops inside a loop, with the way to each."""
    for stmt, where in statements(loop):
        if isinstance(stmt, ast.For):
            yield stmt, (*path, *where)


def _roll_all(
    code: types.CodeType, node: ast.FunctionDef, found: list[_Found], handing: str, leaves: bool
) -> Rewritten:
    declined: list[NotRolled] = []
    taken: set[int] = set()
    changed: list[ast.FunctionDef] = []
    for one in found:
        line = one.loop.lineno
        if isinstance(one.verdict, Declined):
            declined.append(NotRolled(one.verdict.reason, code.co_filename, line))
        if not isinstance(one.verdict, Candidate) or id(one.loop) in taken:
            continue
        try:
            _roll_one(one, one.verdict, loop_key(code.co_filename, line))
        except Unrollable as error:
            declined.append(NotRolled(str(error), code.co_filename, line))
            continue
        taken |= {id(inner) for inner in ast.walk(one.loop)}
        changed += [one.function] if one.function not in changed else []
    if not taken and not handing and not leaves:
        return Rewritten(None, tuple(declined))
    for function in changed:
        _import_words(function, call("compiling"))
    if handing and node not in changed:
        key = ast.Constant(loop_key(code.co_filename, code.co_firstlineno))
        _import_words(node, call("handing", key, ast.Constant(handing)))
    elif leaves and node not in changed:
        _import_words(node, call("eager"))
    return Rewritten(source.compile_like(code, node), tuple(declined))


def _roll_one(found: _Found, candidate: Candidate, key: str) -> None:
    loop, path = candidate.loop, found.path
    body = rolled(candidate, key, found.function)
    own = found.loop if found.turned is not None else loop
    elsewhere = keep_on_device(found.function, own, call("keeps", ast.Constant(key)))
    if elsewhere is not None:
        raise Unrollable(f"the list {elsewhere} is read elsewhere than in the loop")
    rolls, as_written = call("enter", ast.Constant(key)), own
    if found.turned is not None:
        rolls, enter = call("keeps", ast.Constant(key)), ast.Expr(rolls)
        turned: list[ast.stmt] = [ast.For(found.turned.holder.target, found.turned.holder.iter, [enter, *body], [])]
        body = turned
    if found.instead is not None:
        _, block, place = path[-1]
        body = [*block[:place], *body, *block[place + 1 :]]
        path, as_written = path[:-1], found.instead
    choice = ast.If(rolls, body, [as_written])
    _locate(choice, loop)
    _, block, place = path[-1]
    block[place] = choice


def _locate(tree: ast.AST, loop: ast.For) -> None:
    """Give new nodes a line: their parent's, or the loop's."""

    def fill(node: ast.AST, line: int) -> None:
        if isinstance(node, (ast.expr, ast.stmt, ast.excepthandler, ast.arg, ast.keyword)):
            if not hasattr(node, "lineno"):
                node.lineno = node.end_lineno = line
                node.col_offset = node.end_col_offset = 0
            line = node.lineno
        for child in ast.iter_child_nodes(node):
            fill(child, line)

    fill(tree, loop.lineno)


def _import_words(node: ast.FunctionDef, asked: ast.expr) -> None:
    start = 1 if ast.get_docstring(node, clean=False) is not None else 0
    line = node.body[min(start, len(node.body) - 1)].lineno
    words = ast.ImportFrom("moec.capture", [ast.alias("trace", RUNTIME)], 0)
    # Asked at once, since it also lets the compile trace the shapes that depend on data before the loop.
    ask = ast.Expr(asked)
    for stmt in (words, ask):
        stmt.lineno = stmt.end_lineno = line
        stmt.col_offset = stmt.end_col_offset = 0
        ast.fix_missing_locations(stmt)
    node.body[start:start] = [words, ask]
