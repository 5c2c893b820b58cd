"""A chain of `where` that gives each token the rows of the expert that it chose is a sum of masked rows.

where(ids == 1, f₁(x), where(ids == 0, f₀(x), 0))   →   [ids == 0]·f₀(x) + [ids == 1]·f₁(x)

A token has one id, so at most one mask holds. What stands at the end of the chain counts for nobody where it is 0, or
where the masks are of every id that there can be.
"""

from __future__ import annotations

from moec.ir.graph import Arg, Instr, Ref, Type
from moec.passes.canonical.ranges import Ranges
from moec.passes.canonical.rewriter import Rewriter, again

_FLOATS = ("f32", "bf16", "f16")
_VIEWS = ("reshape", "expand", "cast", "same")


def rule_chain(state: Rewriter, instr: Instr) -> Instr | None:
    """The outermost `where` of a chain as the sum; with a number a row that multiplies it behind, that product."""
    if instr.types[0].dtype not in _FLOATS:
        return None
    if instr.word == "where":
        return None if _goes_on(state, instr) else _summed(state, instr, instr, None)
    if instr.word != "mul" or len(instr.uses) != 2:
        return None
    for chain, number in (instr.args, instr.args[::-1]):
        where, kind = state.by(chain, "where"), state.type(number)
        if where is not None and where.types == instr.types and _a_row(kind, instr.types[0]):
            return _summed(state, instr, where, number)
    return None


def _summed(state: Rewriter, instr: Instr, outermost: Instr, number: Arg | None) -> Instr | None:
    """The chain that ends in `outermost`, times `number`, as the sum that `instr` is."""
    pairs: list[tuple[Ref, int]] = []
    links: list[Instr] = []
    rest: Arg = Ref(outermost.results[0])
    at: Instr | None = outermost
    while at is not None and at.types == instr.types and (found := _chosen(state, at)) is not None:
        pairs.append(found)
        links.append(at)
        rest = at.args[2]
        at = state.by(rest, "where")
    ids, numbers = {_seen(state, value) for value, _ in pairs}, {e for _, e in pairs}
    if len(ids) != 1 or len(numbers) != len(pairs):
        return None
    if not state.is_zero(rest) and not _all_ids(state, pairs[0][0], numbers):
        return None
    total: Arg | None = None
    for link in reversed(links[1:]):
        term = state.emit("mul", _masked(state, link, number), instr.types[0])
        total = term if total is None else state.emit("add", (total, term), instr.types[0])
    last = _masked(state, outermost, number)
    if total is None:
        return again(instr, "mul", last)
    return again(instr, "add", (total, state.emit("mul", last, instr.types[0])))


def _seen(state: Rewriter, arg: Arg) -> tuple[object, ...]:
    """A value by what it is a view of: `ids[:, 0]` may be written once for each expert."""
    made = state.by(arg, "slice", "reshape", "cast", "same")
    if made is None:
        return (arg,)
    return (*_seen(state, made.args[0]), made.word, made.args[1:], made.attrs, made.types)


def _a_row(kind: Type, to: Type) -> bool:
    """Whether a value is one number for each row of another."""
    return kind.rank == to.rank and kind.shape == (*to.shape[:-1], 1) and to.shape[-1] != 1 and kind.dtype == to.dtype


def _chosen(state: Rewriter, where: Instr) -> tuple[Ref, int] | None:
    """(ids, e) where the mask asks, once a token, whether ids are e, of rows of the result's shape."""
    mask, rows = where.args[0], where.args[1]
    kind, to = state.type(mask), where.types[0]
    held = state.graph.behind(state.behind(mask, *_VIEWS), _VIEWS)  # of a link that comes later, too
    asked = state.graph.defs.get(held.name) if isinstance(held, Ref) else None
    if (
        asked is None
        or asked.word != "eq"
        or state.type(rows) != to
        or kind.rank != to.rank
        or kind.shape[-1] != 1
        or to.shape[-1] == 1
    ):
        return None
    if kind.shape[:-1] != to.shape[:-1]:
        return None
    ids, number = asked.args
    if not isinstance(ids, Ref) or isinstance(number, bool) or not isinstance(number, int):
        return None
    return (ids, number) if state.type(ids).dtype in ("i64", "i32") else None


def _goes_on(state: Rewriter, where: Instr) -> bool:
    """Whether the chain's next `where` takes the value where its own mask does not hold, or a number a row times it."""
    name = where.results[0]
    users = state.graph.users.get(name, ())
    if len(users) != 1 or name in state.graph.outputs or users[0].types != where.types:
        return False
    if users[0].word == "mul":
        return any(_a_row(state.graph.types[each], where.types[0]) for each in users[0].uses)
    return users[0].word == "where" and users[0].args[2] == Ref(name) and _chosen(state, users[0]) is not None


def _masked(state: Rewriter, where: Instr, factor: Arg | None) -> tuple[Arg, Arg]:
    """Rows, and what they are multiplied by: their mask, and a number a row that comes behind or that they have."""
    mask, rows, to = where.args[0], where.args[1], where.types[0].dtype
    gate = state.emit("cast", (mask,), Type(to, state.type(mask).shape), dtype=to)
    if factor is not None:
        gate = state.emit("mul", (gate, factor), state.type(gate))
    made = state.by(rows, "mul")
    if made is not None and len(made.uses) == 2:
        for number, others in (made.args, made.args[::-1]):
            same = state.type(number).shape == state.type(mask).shape and state.type(others) == where.types[0]
            if same and state.type(number).dtype == to:
                return others, state.emit("mul", (gate, number), state.type(gate))
    return rows, gate


def _all_ids(state: Rewriter, ids: Ref, numbers: set[int]) -> bool:
    """Whether ids are among these numbers, by what made them."""
    low, high = Ranges(state.graph).of(ids)
    return numbers.issuperset(range(int(low), int(high) + 1)) if high - low < len(numbers) else False
