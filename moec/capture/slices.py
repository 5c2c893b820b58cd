"""Rows that a loop selects by running bounds, `xs[start:end]`, and rows that it collects in a list for `cat`."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from moec.capture.events import Path, after, called, loaded, stored
from moec.capture.host import Scope, chunks_of, tensor_of

JOINING = frozenset(("cat", "concat", "concatenate", "vstack", "row_stack"))


def bound_names(loop: ast.For, scope: Scope, aliases: set[str], tainted: set[str]) -> set[str]:
    """The names of bounds of slices that hold counts of rows; empty where bounds are made of the item alone."""
    names: set[str] = set()
    for bound in _bounds(loop):
        names |= loaded([bound]) & tainted - aliases
    statements = [n for n in ast.walk(ast.Module(loop.body, [])) if isinstance(n, (ast.Assign, ast.AugAssign))]
    while True:
        more = set(names)
        for stmt in statements:
            if stored([stmt]) & names:
                more |= loaded([stmt.value]) & tainted - aliases
        if more == names:
            break
        names = more
    values: list[ast.AST] = [s.value for s in statements if stored([s]) & names]
    counted = names & _joint_hosts(loop, scope.hosts)
    return names if counted or any(looks_up(v, aliases) for v in (*values, *_bounds(loop))) else set()


def cuts(expr: ast.AST, bounds: set[str], aliases: set[str]) -> bool:
    """Whether an expression slices rows by counted bounds."""
    return any(
        loaded([bound]) & bounds or looks_up(bound, aliases)
        for node in ast.walk(expr)
        if isinstance(node, ast.Subscript)
        for bound in _slice_bounds(node)
    )


def looks_up(expr: ast.AST, aliases: set[str]) -> bool:
    """Whether an expression reads a number at the item, `counts[e]`, or asks sorted numbers for its place."""
    nodes = list(ast.walk(expr))
    placed = (n for n in nodes if isinstance(n, ast.Call) and called(n) in _PLACING)
    return any(isinstance(n, ast.Subscript) and loaded([n.slice]) & aliases for n in nodes) or any(
        loaded(n.args[-1:]) & aliases for n in placed
    )


_PLACING = frozenset(("searchsorted", "bucketize"))


def _cut_names(scope: Scope) -> set[str]:
    """The names of lists of chunks cut by counts."""
    return {
        a.targets[0].id
        for a in scope.assignments
        if isinstance(a.targets[0], ast.Name) and chunks_of(a.value, scope.hosts, scope.given) is not None
    }


def reads_chunk(stmt: ast.stmt, scope: Scope, aliases: set[str]) -> bool:
    """Whether a statement reads the chunk at the item: `chunks[e]`."""
    cut = _cut_names(scope)
    return any(
        isinstance(n, ast.Subscript)
        and isinstance(n.value, ast.Name)
        and n.value.id in cut
        and loaded([n.slice]) & aliases
        for n in ast.walk(stmt)
    )


def chunk_names(loop: ast.For, scope: Scope) -> set[str]:
    """The targets of the loop that are chunks cut by counts: `for i, chunk in enumerate(chunks)`."""
    cut = _cut_names(scope)
    found: set[str] = set()
    for target, sequence in _joint(loop):
        named = isinstance(sequence, ast.Name) and sequence.id in cut
        if named or chunks_of(sequence, scope.hosts, scope.given) is not None:
            found |= stored([target])
    for stmt in ast.walk(ast.Module(loop.body, [])):
        if isinstance(stmt, ast.Assign) and isinstance(stmt.value, ast.Subscript):
            base = stmt.value.value
            found |= stored([stmt]) if isinstance(base, ast.Name) and base.id in cut else set()
    return found


def collected_names(loop: ast.For, path: Path) -> set[str]:
    """The lists, empty before the loop, to which its body appends and which are only joined afterwards."""
    names: set[str] = set()
    for stmt in loop.body:
        name = appended_to(stmt)
        if name is not None:
            names.add(name)
    return {n for n in names if _starts_empty(path, n) and _only_joined(loop, path, n)}


def appended_to(stmt: ast.stmt) -> str | None:
    """The list that a statement appends to: `outs.append(y)`."""
    if not isinstance(stmt, ast.Expr) or not isinstance(stmt.value, ast.Call):
        return None
    func, args = stmt.value.func, stmt.value.args
    if not isinstance(func, ast.Attribute) or func.attr != "append" or len(args) != 1 or stmt.value.keywords:
        return None
    return func.value.id if isinstance(func.value, ast.Name) else None


def _starts_empty(path: Path, name: str) -> bool:
    loop = path[-1][1][path[-1][2]]
    inside = {id(n) for n in ast.walk(loop)}
    values = [
        n.value
        for root in (path[0][0], path[-1][0])
        for n in ast.walk(root)
        if isinstance(n, ast.Assign) and name in stored([n]) and id(n) not in inside and not _joined_anew(n, name)
    ]
    fresh = [isinstance(v, ast.List) and not v.elts for v in values]
    return bool(values) and all(fresh)


def _joined_anew(stmt: ast.stmt, name: str) -> bool:
    """`outs = torch.cat(outs)`: from here on the name is that of a tensor."""
    if not isinstance(stmt, ast.Assign) or len(stmt.targets) != 1 or stored([stmt.targets[0]]) != {name}:
        return False
    calls = (n for n in ast.walk(stmt.value) if isinstance(n, ast.Call) and n.args and _joins(n))
    return any(isinstance(n.args[0], ast.Name) and n.args[0].id == name for n in calls)


def _only_joined(loop: ast.For, path: Path, name: str) -> bool:
    """Whether each other use of the list joins it along the first axis or asks whether it is empty."""
    inside = [n for n in ast.walk(loop) if isinstance(n, ast.Name) and n.id == name]
    if len(inside) != 1:
        return False
    fine: set[int] = set()
    rest = list(after(path))
    anew = next(
        (i for i, stmt in enumerate(rest) if isinstance(stmt, ast.stmt) and _joined_anew(stmt, name)), len(rest)
    )
    rest = rest[: anew + 1]
    for node in (n for root in rest for n in ast.walk(root)):
        if isinstance(node, ast.Call) and node.args and _joins(node):
            fine.add(id(node.args[0]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("len", "bool"):
            fine |= {id(a) for a in node.args}
        if isinstance(node, (ast.If, ast.IfExp)):
            test = node.test.operand if isinstance(node.test, ast.UnaryOp) else node.test
            fine.add(id(test))
    uses = [n for root in rest for n in ast.walk(root) if isinstance(n, ast.Name) and n.id == name]
    return bool(uses) and all(id(n) in fine for n in uses if isinstance(n.ctx, ast.Load))


def _joins(call: ast.Call) -> bool:
    dims = [*call.args[1:], *(k.value for k in call.keywords)]
    return called(call) in JOINING and all(isinstance(d, ast.Constant) and d.value == 0 for d in dims)


def _bounds(loop: ast.For) -> Iterator[ast.expr]:
    for node in ast.walk(ast.Module(loop.body, [])):
        if isinstance(node, ast.Subscript):
            yield from _slice_bounds(node)


def _slice_bounds(node: ast.Subscript) -> Iterator[ast.expr]:
    """The bounds of a slice of the first axis."""
    first = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) and node.slice.elts else node.slice
    if isinstance(first, ast.Slice):
        yield from (b for b in (first.lower, first.upper) if b is not None)


def _joint(loop: ast.For) -> list[tuple[ast.expr, ast.expr]]:
    """The loop's targets with the sequences that they run over."""
    target, sequence = loop.target, loop.iter
    if isinstance(sequence, ast.Call) and isinstance(sequence.func, ast.Name) and sequence.args:
        if sequence.func.id == "enumerate" and isinstance(target, ast.Tuple) and len(target.elts) == 2:
            target, sequence = target.elts[1], sequence.args[0]
        zipped = isinstance(sequence, ast.Call) and isinstance(sequence.func, ast.Name) and sequence.func.id == "zip"
        if zipped and isinstance(target, ast.Tuple) and len(target.elts) == len(sequence.args):  # type: ignore[union-attr]
            return list(zip(target.elts, sequence.args, strict=True))  # type: ignore[union-attr]
    return [(target, sequence)]


def _joint_hosts(loop: ast.For, hosts: frozenset[str]) -> set[str]:
    """The targets that take their values from a list of the host."""
    if not isinstance(loop.iter, ast.Call):
        return set()
    return {n for target, seq in _joint(loop) if tensor_of(seq, hosts) is not None for n in stored([target])}
