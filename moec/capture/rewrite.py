"""One function's code with its loops over experts rolled: `if enter(key): rolled else: loop as written`."""

from __future__ import annotations

import ast
import copy
import dis
import types
from dataclasses import dataclass

from moec.capture import source
from moec.capture.events import Path, events, functions, loops
from moec.capture.recognise import Candidate, Declined, examine
from moec.capture.roll import rolled
from moec.capture.state import NotRolled, loop_key
from moec.capture.words import RUNTIME, Unrollable, call, name, strip_listing

_FOR = dis.opmap["FOR_ITER"]
_STORE = dis.opmap["STORE_SUBSCR"]
_WRITES = frozenset(
    f"{word}{end}"
    for word in ("index_add", "scatter_add", "index_put", "index_copy", "scatter", "scatter_reduce", "index_reduce")
    for end in ("", "_")
) | {"masked_scatter_", "masked_scatter", "slice_scatter"}


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


def promising(code: types.CodeType) -> bool:
    """The cheap test, on bytecode alone: a `for` and an indexed write in one function."""
    ops = code.co_code[::2]
    if _FOR in ops and (_STORE in ops or not _WRITES.isdisjoint(code.co_names)):
        return True
    return any(promising(const) for const in code.co_consts if isinstance(const, types.CodeType))


def rewrite(code: types.CodeType) -> Rewritten:
    """The code with its loops over experts rolled."""
    line = code.co_firstlineno
    try:
        node = source.parse(code)
    except source.NoSource as error:
        return Rewritten(None, (NotRolled(str(error), code.co_filename, line),))
    found = [_Found(owner, loop, path, examine(loop, path)) for owner in functions(node) for loop, path in loops(owner)]
    if not any(one.verdict for one in found):
        return Rewritten(None)
    try:
        if not source.same_code(source.compile_like(code, copy.deepcopy(node)), code):
            raise source.NoSource("its source is not the one that its code was compiled from")
        return _roll_all(code, node, found)
    except source.NoSource as error:
        return Rewritten(None, (NotRolled(str(error), code.co_filename, line),))


def _roll_all(code: types.CodeType, node: ast.FunctionDef, found: list[_Found]) -> Rewritten:
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
            _roll_one(one.function, one.path, one.verdict, loop_key(code.co_filename, line))
        except Unrollable as error:
            declined.append(NotRolled(str(error), code.co_filename, line))
            continue
        taken |= {id(inner) for inner in ast.walk(one.loop)}
        changed += [one.function] if one.function not in changed else []
    if not taken:
        return Rewritten(None, tuple(declined))
    for function in changed:
        _import_words(function)
    return Rewritten(source.compile_like(code, node), tuple(declined))


def _roll_one(function: ast.FunctionDef, path: Path, candidate: Candidate, key: str) -> None:
    loop = candidate.loop
    body = rolled(candidate, key)
    _keep_tensor(function, loop)
    choice = ast.If(call("enter", ast.Constant(key)), body, [loop])
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


def _import_words(node: ast.FunctionDef) -> None:
    start = 1 if ast.get_docstring(node, clean=False) is not None else 0
    line = node.body[min(start, len(node.body) - 1)].lineno
    words = ast.ImportFrom("moec.capture", [ast.alias("trace", RUNTIME)], 0)
    # Asked at once, since it also lets the compile trace the shapes that depend on data before the loop.
    ask = ast.Expr(call("compiling"))
    for stmt in (words, ask):
        stmt.lineno = stmt.end_lineno = line
        stmt.col_offset = stmt.end_col_offset = 0
        ast.fix_missing_locations(stmt)
    node.body[start:start] = [words, ask]


def _keep_tensor(node: ast.FunctionDef, loop: ast.For) -> None:
    """`ids = hit.tolist()` before `for e in ids`: the tensor stays a tensor where the loop is rolled."""
    if not isinstance(loop.iter, ast.Name):
        return
    ids = loop.iter.id
    assigns = [
        n for n in ast.walk(node) if isinstance(n, ast.Assign) and any(e.store and e.name == ids for e in events([n]))
    ]
    reads = sum(1 for e in events([node]) if e.name == ids and not e.store)
    if (
        len(assigns) != 1
        or reads != 1
        or len(assigns[0].targets) != 1
        or not isinstance(assigns[0].targets[0], ast.Name)
    ):
        return
    assignment = assigns[0]
    tensor = strip_listing(assignment.value)
    if tensor is assignment.value:
        return
    kept = f"_moec_kept_{ids}"
    as_written = copy.deepcopy(assignment.value)
    assignment.value = ast.IfExp(
        call("keeps", ast.NamedExpr(ast.Name(kept, ast.Store()), tensor)), name(kept), _on(as_written, kept)
    )
    loop.iter = call("unlisted", loop.iter)
    for tree in (assignment, loop.iter):
        _locate(tree, loop)


def _on(chain: ast.expr, base: str) -> ast.expr:
    """The chain of conversions on another receiver."""
    if isinstance(chain, ast.Call) and isinstance(chain.func, ast.Attribute) and strip_listing(chain) is not chain:
        return ast.Call(ast.Attribute(_on(chain.func.value, base), chain.func.attr, ast.Load()), [], [])
    return name(base)
