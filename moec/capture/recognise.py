"""Which `for` loops run over experts: rows selected by the loop's variable, results added into an outer tensor."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moec.capture.dense import dense_sums
from moec.capture.events import Path, after, events, loaded, nested, read_first, stored
from moec.capture.host import Scope, counters
from moec.capture.rebinds import WRITES, adds, flat, keeps, rebound_name, recast, updates
from moec.capture.slices import appended_to, bound_names, chunk_names, collected_names, cuts, reads_chunk

# What these return is a Python number or a range, never rows.
_NUMBERS = frozenset(("slice", "range", "len", "int", "float", "min", "max", "sum"))
_SELECTORS = frozenset(("where", "nonzero", "argwhere", "eq", "ne", "flatnonzero", "nonzero_static"))
_METADATA = frozenset(("dtype", "device", "shape", "size", "dim", "ndim", "numel", "new_zeros", "is_cuda"))
_GROWING = frozenset(("append", "extend", "insert", "update", "setdefault", "add", "pop", "remove", "clear"))
_UNWRAPPING = frozenset(("item", "squeeze", "long", "tolist", "view", "reshape", "to"))


@dataclass(frozen=True)
class Candidate:
    """A loop that can be rolled: what is written in place, what is carried from one iteration to the next."""

    loop: ast.For
    like: ast.expr  # an accumulator, as a name, for its device; None where rows are only collected
    aliases: frozenset[str]  # names of the loop's item itself
    tainted: frozenset[str]  # names that depend on the item
    selected: frozenset[str]  # names of rows and masks that the item selects
    carried: tuple[str, ...]
    in_place: tuple[str, ...]  # names that `+=` or a cast to what it is already rebinds to the same tensor
    counters: tuple[str, ...] = ()  # carried names that hold a number before the loop
    collected: tuple[str, ...] = ()  # lists that the body appends rows to


@dataclass(frozen=True)
class Declined:
    """A loop that selects and accumulates, yet cannot be rolled."""

    loop: ast.For
    reason: str


@dataclass(frozen=True)
class _Write:
    """An indexed write: the outer expression written to, its row index, the statement."""

    target: ast.expr
    keys: tuple[ast.AST, ...]
    stmt: ast.stmt
    rebinds: bool  # `y = y.index_add(…)` rather than in place


def examine(loop: ast.For, path: Path, scope: Scope) -> Candidate | Declined | None:
    """The loop as a candidate, as one that nearly is, or None where it has nothing of a loop over experts."""
    writes = [w for w in _writes(loop) if _root(w.target) is not None]
    collected = collected_names(loop, path)
    inner = stored(loop.body) | stored([loop.target])
    rebound = read_first([loop.target, *loop.body]) & stored(loop.body)
    if not writes and not collected and not rebound:
        return None
    counted = counters(scope, loop) & rebound
    aliases = aliases_of(loop) - counted
    tainted = tainted_by(loop)
    bounds = bound_names(loop, scope, aliases, tainted)
    selectors = (_derived(loop, aliases, bounds) - bounds) | chunk_names(loop, scope)
    writes = [w for w in writes if _root(w.target) not in inner or _root(w.target) in rebound]
    writes = [w for w in writes if any(_is_rows(key, selectors - aliases, aliases, bounds) for key in w.keys)]
    computed = _computed(loop, selectors, bounds, aliases)
    appends = [
        s for s in loop.body if loaded([s]) & computed or cuts(s, bounds, aliases) or reads_chunk(s, scope, aliases)
    ]
    collected &= {appended_to(s) for s in appends}
    summed = [] if writes or collected else dense_sums(loop, rebound - counted, aliases, selectors - aliases, tainted)
    if not writes and not collected and not summed:
        return None
    reason = _obstacle(loop, path, writes, rebound - counted, collected)
    if reason:
        return Declined(loop, reason)
    plus = {n for n in rebound if (bound := updates(loop, n)) and all(keeps(s, n) for s in bound)}
    return Candidate(
        loop,
        _like(writes, summed),
        frozenset(aliases),
        frozenset(tainted | counted),
        frozenset(selectors - aliases),
        tuple(sorted(rebound - (plus - counted))),
        tuple(sorted(rebound & plus - counted)),
        tuple(sorted(counted)),
        tuple(sorted(collected)),
    )


def _like(writes: list[_Write], summed: list[str]) -> ast.expr:
    """An accumulator, as a name; None where rows are only collected."""
    name = (_root(writes[0].target) or "") if writes else next(iter(summed), "None")
    return ast.parse(name, mode="eval").body


_VIEWS = frozenset(("view", "reshape", "flatten", "view_as", "squeeze", "unsqueeze"))


def _is_rows(key: ast.AST, selectors: set[str], aliases: set[str], bounds: set[str]) -> bool:
    """Whether an index holds rows or a mask that the item selects, or counted bounds of rows."""
    parts = key.elts if isinstance(key, ast.Tuple) else [key]
    if isinstance(parts[0], ast.Slice) and cuts(ast.Subscript(ast.Name("_"), parts[0]), bounds, aliases):
        return True
    parts = [part for part in parts if not isinstance(part, ast.Slice)]
    return any(loaded([part]) & selectors or _selects(part, aliases) or cuts(part, bounds, aliases) for part in parts)


def _root(expr: ast.expr) -> str | None:
    """The name, or `self.name` chain, whose tensor an expression views; None for a value of its own."""
    while True:
        if isinstance(expr, ast.Subscript):
            expr = expr.value
        elif isinstance(expr, ast.Call) and isinstance(expr.func, ast.Attribute) and expr.func.attr in _VIEWS:
            expr = expr.func.value
        elif isinstance(expr, ast.Attribute) and expr.attr == "data":
            expr = expr.value
        else:
            break
    if isinstance(expr, ast.Name):
        return expr.id
    base = expr
    while isinstance(base, ast.Attribute):
        base = base.value
    return ast.unparse(expr) if isinstance(expr, ast.Attribute) and isinstance(base, ast.Name) else None


def _targets(loop: ast.For) -> set[str]:
    """The names bound to the item's position: not the experts that `enumerate` or `zip` bind beside it."""
    target, call = loop.target, loop.iter
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "enumerate":
        target = target.elts[0] if isinstance(target, ast.Tuple) and target.elts else target
    return stored([target])


def aliases_of(loop: ast.For) -> set[str]:
    """The loop's item and the names that only unwrap it: `e = e[0]`, `e = int(e)`, `e = e.item()`."""
    names = _targets(loop)
    for stmt in flat(loop.body):
        if isinstance(stmt, ast.Assign) and is_alias(stmt.value, names):
            names |= {t.id for t in stmt.targets if isinstance(t, ast.Name)}
    return names


def is_alias(expr: ast.expr, names: set[str] | frozenset[str]) -> bool:
    """Whether the expression is the loop's item, at most unwrapped."""
    if isinstance(expr, ast.Name):
        return expr.id in names
    if isinstance(expr, ast.Subscript):
        return isinstance(expr.slice, ast.Constant) and is_alias(expr.value, names)
    if isinstance(expr, ast.Call) and isinstance(expr.func, ast.Name) and expr.func.id == "int" and len(expr.args) == 1:
        return is_alias(expr.args[0], names)
    if isinstance(expr, ast.Call) and isinstance(expr.func, ast.Attribute) and expr.func.attr in _UNWRAPPING:
        return is_alias(expr.func.value, names)
    return False


def is_one(part: ast.expr, names: set[str] | frozenset[str]) -> bool:
    """Whether a part of an index is `e:e + 1` of the loop's item."""
    if not isinstance(part, ast.Slice) or part.step is not None or not isinstance(part.upper, ast.BinOp):
        return False
    if part.lower is None or not isinstance(part.lower, ast.Name) or not is_alias(part.lower, names):
        return False
    sides = {ast.unparse(part.upper.left), ast.unparse(part.upper.right)}
    return isinstance(part.upper.op, ast.Add) and sides == {part.lower.id, "1"}


def tainted_by(loop: ast.For) -> set[str]:
    names = stored([loop.target])
    while True:
        more = set(names)
        for stmt in flat(loop.body):
            if loaded([stmt]) & more:
                more |= stored([stmt]) if isinstance(stmt, (ast.Assign, ast.AugAssign, ast.AnnAssign)) else set()
        for node in ast.walk(ast.Module(loop.body, [])):
            if isinstance(node, ast.NamedExpr) and loaded([node.value]) & more:
                more |= stored([node.target])
        if more == names:
            return names
        names = more


def _selects(expr: ast.AST, aliases: set[str]) -> bool:
    """Whether an expression derives rows or a mask from the item: `idx == e`, `where(mask[e])`, `mask[e]`."""
    called = {id(node.func) for node in ast.walk(expr) if isinstance(node, ast.Call)}
    for node in ast.walk(expr):
        if isinstance(node, ast.Compare) and any(is_alias(x, aliases) for x in (node.left, *node.comparators)):
            return True
        if isinstance(node, ast.Subscript) and id(node) not in called and not is_alias(node, aliases):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            if any(is_alias(part, aliases) or is_one(part, aliases) for part in parts):
                return True
        if isinstance(node, ast.Call) and _called_name(node) in _SELECTORS and loaded([node]) & aliases:
            return True
    return False


def _called_name(call: ast.Call) -> str | None:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else None


def _derived(loop: ast.For, aliases: set[str], bounds: set[str]) -> set[str]:
    """Names of rows and masks that the item selects; what a called expert returns is none of them."""
    names: set[str] = set()
    for _ in range(3):
        for stmt in flat(loop.body):
            if not isinstance(stmt, (ast.Assign, ast.AnnAssign)) or stmt.value is None:
                continue
            called = {
                n.func.id
                for n in ast.walk(stmt.value)
                if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and not is_alias(n, aliases)
            }
            if called & (names | _NUMBERS) or is_alias(stmt.value, aliases):
                continue
            if stored([stmt]) & bounds:
                continue
            if loaded([stmt.value]) & names or _selects(stmt.value, aliases) or cuts(stmt.value, bounds, aliases):
                names |= stored([stmt])
    return names


def _computed(loop: ast.For, selectors: set[str], bounds: set[str], aliases: set[str]) -> set[str]:
    """Names of what is computed from rows that the item selects, by whatever is called."""
    names = set(selectors)
    while True:
        more = set(names)
        for stmt in flat(loop.body):
            if isinstance(stmt, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and stmt.value is not None:
                reads = loaded([stmt.value]) & more or cuts(stmt.value, bounds, aliases)
                more |= stored([stmt]) - bounds if reads else set()
        if more == names:
            return names
        names = more


def _writes(loop: ast.For) -> Iterator[_Write]:
    for stmt in flat(loop.body):
        if isinstance(stmt, ast.AugAssign) and isinstance(stmt.target, ast.Subscript):
            yield _Write(stmt.target.value, (stmt.target.slice,), stmt, False)
        if isinstance(stmt, ast.Assign) and len(stmt.targets) == 1 and isinstance(stmt.targets[0], ast.Subscript):
            yield _Write(stmt.targets[0].value, (stmt.targets[0].slice,), stmt, False)
        if isinstance(stmt, (ast.Expr, ast.Assign, ast.AugAssign)):
            yield from _write_calls(stmt)


def _write_calls(stmt: ast.Expr | ast.Assign | ast.AugAssign) -> Iterator[_Write]:
    rebound = rebound_name(stmt)
    for call in (n for n in ast.walk(stmt.value) if isinstance(n, ast.Call)):
        name = _called_name(call)
        if name is None or name.rstrip("_") not in WRITES or not isinstance(call.func, ast.Attribute):
            continue
        function = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
        if function and not call.args:
            continue
        base = call.args[0] if function else call.func.value
        place = WRITES[name.rstrip("_")] + function
        keys = [
            *call.args[place : place + 1],
            *(k.value for k in call.keywords if k.arg in ("index", "indices", "mask")),
        ]
        if name.endswith("_") and _root(base) is not None:
            yield _Write(base, tuple(keys), stmt, False)
        elif rebound:
            yield _Write(ast.Name(rebound, ast.Load()), tuple(keys), stmt, True)


def in_place_names(block: Iterable[ast.stmt]) -> set[str]:
    """The names of what a block writes to in place, as far as its text tells."""
    names: set[str] = set()
    for node in (n for stmt in block for n in ast.walk(stmt)):
        changed: ast.expr | None = None
        if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            changed = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_"):
            changed = node.func.value
        root = _root(changed) if changed is not None else None
        names |= {root.split(".")[0]} if root is not None else set()
    return names


def _obstacle(loop: ast.For, path: Path, writes: list[_Write], rebound: set[str], collected: set[str]) -> str | None:
    """Why the loop cannot be rolled, or None."""
    if loop.orelse:
        return "the loop has an else branch"
    inside = nested(loop)
    for node in ast.walk(loop):
        if isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom, ast.Await, ast.Try, ast.Global, ast.Nonlocal)):
            return f"the body has a {type(node).__name__.lower()} statement"
        if isinstance(node, ast.Break) and id(node) not in inside:
            return "the body breaks out of the loop"
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            return f"the body sets the attribute {ast.unparse(node)}"
    inner = stored(loop.body) | stored([loop.target])
    shared = inner & _shared(path)
    if shared:
        return f"{', '.join(sorted(shared))} is shared with another function"
    for node in ast.walk(loop):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in _GROWING:
            continue
        root = _root(node.func.value)
        if root is not None and root not in inner and root not in collected:
            return f"the body changes a Python object of the outside: {ast.unparse(node.func)}"
    live = (inner - rebound) & read_first(after(path))
    if live:
        return f"{', '.join(sorted(live))} of the last iteration is used after the loop"
    return _not_accumulator(loop, writes, rebound)


def _shared(path: Path) -> set[str]:
    """Names that other functions see: declared global or nonlocal, or read by a function inside this one."""
    function, loop = path[0][0], path[-1][1][path[-1][2]]
    own = {id(node) for node in ast.walk(loop)}
    names: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            names |= set(node.names)
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) and node is not function and id(node) not in own:
            names |= loaded([node])
    return names


def _not_accumulator(loop: ast.For, writes: list[_Write], rebound: set[str]) -> str | None:
    """Every value carried around the loop, and every tensor written, may only be added to."""
    for name in sorted(rebound):
        bound = updates(loop, name)
        kept = [s for s in bound if keeps(s, name)]
        if any(not adds(s, name) for s in bound if not recast(s, name)):
            return f"{name} changes from one iteration to the next in another way than by adding"
        if len(kept) < len(bound) and any(isinstance(s, ast.AugAssign) for s in kept):
            return f"{name} is added to in place and bound anew"
        added = {id(w.stmt) for w in writes if _root(w.target) == name} | {id(s) for s in bound}
        reads = sum(1 for e in events(loop.body) if e.name == name and not e.store)
        if reads - _metadata_reads(loop, name) > len(added):
            return f"{name} is read in the body besides being added to"
    for write in writes:
        root = _root(write.target)
        if root is None or root in rebound:
            continue
        own = {id(n) for w in writes if _root(w.target) == root for n in ast.walk(w.stmt)}
        for node in ast.walk(ast.Module(loop.body, [])):
            if not isinstance(node, (ast.Name, ast.Attribute)) or id(node) in own or ast.unparse(node) != root:
                continue
            if isinstance(node.ctx, ast.Load) and not _is_metadata(loop, node):
                return f"{root} is read in the body besides being written to"
        if any(_reads_elsewhere(w, root) for w in writes if _root(w.target) == root):
            return f"{root} is read in the body at other rows than it is written to"
    return None


def _metadata_reads(loop: ast.For, name: str) -> int:
    nodes = (n for n in ast.walk(ast.Module(loop.body, [])) if isinstance(n, ast.Attribute) and n.attr in _METADATA)
    return sum(isinstance(n.value, ast.Name) and n.value.id == name for n in nodes)


def _is_metadata(loop: ast.For, node: ast.AST) -> bool:
    return any(isinstance(n, ast.Attribute) and n.value is node and n.attr in _METADATA for n in ast.walk(loop))


def _reads_elsewhere(write: _Write, root: str) -> bool:
    """Whether the written statement reads its target other than as the base of the same rows."""
    if isinstance(write.stmt, ast.AugAssign):
        value: ast.AST | None = write.stmt.value
    else:
        value = getattr(write.stmt, "value", None)
    if value is None:
        return False
    keys = {ast.dump(key) for key in write.keys}
    fine: set[int] = set()
    for node in ast.walk(value):
        if isinstance(node, ast.Subscript) and ast.dump(node.slice) in keys:
            fine |= {id(n) for n in ast.walk(node.value)}
        if isinstance(node, ast.Attribute) and node.attr in _METADATA:
            fine.add(id(node.value))
        if isinstance(node, ast.Call) and (_called_name(node) or "").rstrip("_") in WRITES:
            fine |= {id(n) for n in ast.walk(node.func)}
            fine |= {id(n) for a in node.args[:1] for n in ast.walk(a)}
    return any(
        isinstance(node, (ast.Name, ast.Attribute)) and id(node) not in fine and ast.unparse(node) == root
        for node in ast.walk(value)
    )
