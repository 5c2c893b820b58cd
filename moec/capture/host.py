"""Numbers on the host: lists of counts that a loop reads, and the tensors that they came from.

`counts = torch.bincount(ids).tolist()` moves numbers to Python; a loop that is rolled reads the tensor instead.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Collection
from dataclasses import dataclass

from moec.capture.events import called, loaded, stored

_MOVING = frozenset(("tolist", "numpy"))
_LISTING = _MOVING | {"cpu", "detach"}
_SUMMING = frozenset(("cumsum", "accumulate"))
_SAME = frozenset(("list", "tuple", "iter"))
_DISTINCT = frozenset(("set", "frozenset"))
SPLITTING = frozenset(("split", "split_with_sizes"))


def strip_listing(items: ast.expr) -> ast.expr:
    """`hit.cpu().tolist()` as `hit`: a rolled loop runs over the tensor itself."""
    while isinstance(items, ast.Call) and _is_bare(items, _LISTING):
        items = items.func.value  # type: ignore[attr-defined]
    return items


def indexing_lists(loop: ast.For, tainted: frozenset[str]) -> frozenset[str]:
    """The names of lists of rows that a body does nothing with but index: `rows = idx.tolist(); x[rows]`."""
    made: dict[str, bool] = {}
    fine: set[int] = set()
    for node in ast.walk(ast.Module(loop.body, [])):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            whole = isinstance(node.value, ast.Call) and _is_bare(node.value, _MOVING)
            name = node.targets[0].id
            made[name] = made.get(name, True) and whole and bool(loaded([node.value]) & tainted)
        if isinstance(node, ast.Subscript):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            fine |= {id(part) for part in parts}
    reads = [n for n in ast.walk(loop) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    elsewhere = {n.id for n in reads if id(n) not in fine}
    return frozenset(name for name, ok in made.items() if ok) - elsewhere


def asked_numbers(loop: ast.For) -> frozenset[str]:
    """The names of numbers that a body only asks about: `n = mask.sum().item()`, `if n == 0: continue`."""
    tests = {id(n) for stmt in ast.walk(loop) if isinstance(stmt, ast.If) for n in ast.walk(stmt.test)}
    names = [n for n in ast.walk(loop) if isinstance(n, ast.Name)]
    bound = [n.id for n in names if isinstance(n.ctx, ast.Store)]
    elsewhere = {n.id for n in names if isinstance(n.ctx, ast.Load) and id(n) not in tests}
    moved = {
        stmt.targets[0].id
        for stmt in loop.body
        if isinstance(stmt, ast.Assign) and len(stmt.targets) == 1 and isinstance(stmt.targets[0], ast.Name)
        if isinstance(stmt.value, ast.Call) and _is_bare(stmt.value, frozenset(("item",)))
    }
    return frozenset(name for name in moved if bound.count(name) == 1) - elsewhere


def tensor_of(expr: ast.expr, hosts: frozenset[str]) -> ast.expr | None:
    """The expression as a tensor that stayed where it was; None where it is no list that came from one."""
    if isinstance(expr, ast.Name):
        return expr if expr.id in hosts else None
    if isinstance(expr, ast.Call):
        return _called(expr, hosts)
    if isinstance(expr, ast.BinOp) and isinstance(expr.op, ast.Add) and _is_zeros(expr.left):
        tail = tensor_of(expr.right, hosts)
        return None if tail is None else _word("leading", tail)
    if isinstance(expr, ast.List) and len(expr.elts) == 2 and isinstance(expr.elts[1], ast.Starred):
        tail = tensor_of(expr.elts[1].value, hosts) if _is_zero(expr.elts[0]) else None
        return None if tail is None else _word("leading", tail)
    return _numbers(expr, hosts) if isinstance(expr, ast.ListComp) else None


def chunks_of(expr: ast.expr, hosts: frozenset[str], given: frozenset[str] = frozenset()) -> ast.expr | None:
    """`x.split(counts)` with counts on the host, or given by the caller, as the word that leaves them on the device."""
    if not isinstance(expr, ast.Call) or not isinstance(expr.func, ast.Attribute) or expr.func.attr not in SPLITTING:
        return None
    function = isinstance(expr.func.value, ast.Name) and expr.func.value.id == "torch"
    args = [*([] if function else [expr.func.value]), *expr.args]
    named = {k.arg: k.value for k in expr.keywords}
    sizes = args[1] if len(args) > 1 else named.get("split_size_or_sections", named.get("split_size"))
    dim = args[2] if len(args) > 2 else named.get("dim")
    if not args or sizes is None or (dim is not None and not _is_zero(dim)):
        return None
    kept = tensor_of(sizes, hosts | given)
    if kept is None:
        return None
    rows = _uncut(args[0], sizes)
    return _word("runs", args[0], kept) if rows is None else _word("runs_of_first", rows, kept)


def _uncut(rows: ast.expr, sizes: ast.expr) -> ast.expr | None:
    """x of `x[:sum(counts)]` where it is cut by `counts`: no chunk reaches further. None for anything else."""
    if not isinstance(rows, ast.Subscript) or not isinstance(rows.slice, ast.Slice) or not isinstance(sizes, ast.Name):
        return None
    start, stop, step = rows.slice.lower, rows.slice.upper, rows.slice.step
    if not isinstance(stop, ast.Call) or len(stop.args) != 1 or stop.keywords or step is not None:
        return None
    first = start is None or _is_zero(start)
    summed = isinstance(stop.func, ast.Name) and stop.func.id == "sum" and _is_name(stop.args[0], sizes.id)
    return rows.value if first and summed else None


def kept_form(expr: ast.expr, hosts: frozenset[str], given: frozenset[str] = frozenset()) -> ast.expr | None:
    """What stands for a list of the host, or for chunks cut by one, where a loop is rolled."""
    found = tensor_of(expr, hosts)
    return found if found is not None else chunks_of(expr, hosts, given)


@dataclass(frozen=True)
class Scope:
    """What the loops of a function see of it, as it is written now.

    assignments  to one target, in the order of their lines
    hosts        names of lists that came from tensors, and of chunks cut by them
    given        names of arguments, which may be such lists of the caller's
    """

    assignments: tuple[ast.Assign, ...]
    hosts: frozenset[str]
    given: frozenset[str] = frozenset()


def scope_of(function: ast.AST) -> Scope:
    """One look at a whole function, for all its loops."""
    found = [n for n in ast.walk(function) if isinstance(n, ast.Assign) and len(n.targets) == 1]
    found.sort(key=lambda n: n.lineno)
    hosts: frozenset[str] = frozenset()
    given = _given(function)
    for assignment in found:
        target = assignment.targets[0]
        if isinstance(target, ast.Name) and kept_form(assignment.value, hosts, given) is not None:
            hosts |= {target.id}
    return Scope(tuple(found), hosts, given)


def _given(function: ast.AST) -> frozenset[str]:
    """The names of a function's plain arguments that it does not bind again."""
    if not isinstance(function, ast.FunctionDef):
        return frozenset()
    return frozenset(a.arg for a in function.args.args) - stored(function.body)


def hands_over(function: ast.FunctionDef) -> bool:
    """Whether a function returns a list of numbers that it moved to the host, keeps it in an object, hands it to
    another or cuts rows by it: that other may cut rows by them.
    """
    moves = [node for node in ast.walk(function) if isinstance(node, ast.Assign) and _moves(node.value)]
    targets = [target for node in moves for target in node.targets]
    if any(isinstance(target, ast.Attribute) for target in targets):
        return True
    moved = {target.id for target in targets if isinstance(target, ast.Name)}
    results = [n.value for n in ast.walk(function) if isinstance(n, ast.Return) and n.value is not None]
    parts = [part for value in results for part in (value.elts if isinstance(value, ast.Tuple) else [value])]
    cut = [
        arg
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and (called(node) in SPLITTING or _is_own(node))
        for arg in (*node.args, *(k.value for k in node.keywords))
    ]
    return any(isinstance(part, ast.Name) and part.id in moved for part in (*parts, *cut)) or any(map(_moves, cut))


ASKING = frozenset(("where", "nonzero", "argwhere"))


def lists_rows(function: ast.FunctionDef) -> bool:
    """Whether a function lists each expert's rows: `[torch.where(choice == e) for e in range(n)]`."""
    for node in ast.walk(function):
        if not isinstance(node, ast.ListComp | ast.DictComp) or len(node.generators) != 1:
            continue
        made = node.elt if isinstance(node, ast.ListComp) else node.value
        calls = [n for n in ast.walk(made) if isinstance(n, ast.Call) and called(n) in ASKING]
        item = stored([node.generators[0].target])
        compares = (n for call in calls for n in ast.walk(call) if isinstance(n, ast.Compare) or called(n) == "eq")
        if any(loaded([n]) & item for n in compares):
            return True
    return False


_LOOPS = (ast.For, ast.While, ast.ListComp, ast.DictComp, ast.GeneratorExp)
COUNTED = frozenset(("bincount",))
LISTED = frozenset(("nonzero", "argwhere"))
ADDED = frozenset(f"{word}{end}" for word in ("index_add", "scatter_add", "index_copy") for end in ("", "_"))


def sized_by_data(names: Collection[str]) -> bool:
    """Whether a function that calls these counts choices, or adds rows of which data say how many there are."""
    return not COUNTED.isdisjoint(names) or not (LISTED.isdisjoint(names) or ADDED.isdisjoint(names))


def counts(function: ast.FunctionDef) -> bool:
    """Whether data say how many counts, or rows that it adds, a function without loops makes.

    A loop over experts that is not rolled is better cut at such rows than traced once for each expert.
    """
    nodes = list(ast.walk(function))
    return not any(isinstance(node, _LOOPS) for node in nodes) and sized_by_data({called(node) for node in nodes})


def _is_own(call: ast.Call) -> bool:
    """Whether what is called is a method of the object itself: `self.run(x, counts)`."""
    return isinstance(call.func, ast.Attribute) and _is_name(call.func.value, "self")


def _moves(value: ast.expr) -> bool:
    """`….tolist()`."""
    return isinstance(value, ast.Call) and _is_bare(value, _MOVING)


def read_after(function: ast.AST, assignment: ast.Assign, name: str) -> list[ast.Name]:
    """The reads of a name in the lines after an assignment to it."""
    own = {id(n) for n in ast.walk(assignment)}
    return [
        n
        for n in ast.walk(function)
        if isinstance(n, ast.Name)
        and n.id == name
        and isinstance(n.ctx, ast.Load)
        and id(n) not in own
        and n.lineno >= assignment.lineno
    ]


def keep_on_device(function: ast.AST, loop: ast.For, ask: ast.expr) -> str | None:
    """Have the lists that a loop reads stay tensors where `ask` holds; the name that something else reads, or None."""
    scope = scope_of(function)
    hosts = scope.hosts
    wanted = loaded([loop.iter, *loop.body]) & hosts
    inside = {id(n) for n in ast.walk(loop)}
    changes: list[tuple[ast.Assign, ast.expr]] = []
    for assignment in reversed(scope.assignments):
        target = assignment.targets[0]
        if not isinstance(target, ast.Name) or target.id not in wanted or id(assignment) in inside:
            continue
        form = kept_form(copy.deepcopy(assignment.value), hosts, scope.given)
        if form is None:
            continue
        if any(id(read) not in inside for read in read_after(function, assignment, target.id)):
            return target.id
        changes.append((assignment, form))
        inside |= {id(n) for n in ast.walk(assignment.value)}
        wanted |= loaded([assignment.value]) & hosts
    for assignment, form in changes:
        assignment.value = ast.IfExp(copy.deepcopy(ask), form, assignment.value)
    return None


def counters(scope: Scope, loop: ast.For) -> frozenset[str]:
    """The names that hold a whole number before the loop and are bound again in it: `start = 0`."""
    inside = {id(n) for n in ast.walk(loop)}
    values: dict[str, list[ast.expr]] = {}
    for assignment in scope.assignments:
        target, value = assignment.targets[0], assignment.value
        if id(assignment) in inside:
            continue
        if isinstance(target, ast.Name):
            values.setdefault(target.id, []).append(value)
    bound = stored(loop.body)
    return frozenset(n for n, held in values.items() if n in bound and all(map(_is_whole, held)))


def _called(expr: ast.Call, hosts: frozenset[str]) -> ast.expr | None:
    func = expr.func
    if _is_bare(expr, _LISTING) and isinstance(func, ast.Attribute):
        inner = tensor_of(func.value, hosts)
        return inner if inner is not None else (strip_listing(func.value) if func.attr in _MOVING else None)
    named = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
    if named in _SUMMING and not expr.keywords:
        whole = len(expr.args) == 1 and not _is_zero(expr.args[0])
        base = expr.args[0] if whole else func.value if isinstance(func, ast.Attribute) else expr
        inner = tensor_of(base, hosts) if base is not expr else None
        return None if inner is None else _word("running", inner)
    if named in _SAME and isinstance(func, ast.Name) and len(expr.args) == 1:
        return tensor_of(expr.args[0], hosts)
    if named in _DISTINCT and isinstance(func, ast.Name) and len(expr.args) == 1:
        inner = tensor_of(expr.args[0], hosts)
        return None if inner is None else _word("distinct", inner)
    return None


def _numbers(expr: ast.ListComp, hosts: frozenset[str]) -> ast.expr | None:
    """`[n.item() for n in counts]` and `[int(n) for n in counts]`."""
    each, elt = expr.generators[0], expr.elt
    if len(expr.generators) != 1 or each.ifs or not isinstance(each.target, ast.Name) or not isinstance(elt, ast.Call):
        return None
    name = each.target.id
    unwrapped = _is_bare(elt, frozenset(("item",))) and _is_name(elt.func.value, name)  # type: ignore[attr-defined]
    whole = (
        isinstance(elt.func, ast.Name) and elt.func.id == "int" and len(elt.args) == 1 and _is_name(elt.args[0], name)
    )
    if not (unwrapped or whole):
        return None
    inner = tensor_of(each.iter, hosts)
    return inner if inner is not None else each.iter


def _is_bare(call: ast.Call, names: frozenset[str]) -> bool:
    """A method of one of these names, called without arguments."""
    return isinstance(call.func, ast.Attribute) and call.func.attr in names and not (call.args or call.keywords)


def _is_name(expr: ast.expr, name: str) -> bool:
    return isinstance(expr, ast.Name) and expr.id == name


def _is_whole(expr: ast.expr) -> bool:
    return isinstance(expr, ast.Constant) and type(expr.value) is int


def _is_zero(expr: ast.expr) -> bool:
    return isinstance(expr, ast.Constant) and type(expr.value) is int and expr.value == 0


def _is_zeros(expr: ast.expr) -> bool:
    return isinstance(expr, ast.List) and len(expr.elts) == 1 and _is_zero(expr.elts[0])


def _word(word: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.Attribute(ast.Name("_moec_trace", ast.Load()), word, ast.Load()), list(args), [])
