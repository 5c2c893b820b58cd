"""Tables of seats that are filled and read by number: rows written to a flat buffer, and rows taken back from it.

%buf = index_add(zeros[E·C, H], %seat, %x); %y = experts on %buf as [E, C, H]; index(%y, %seat)   →   each pair's row
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy

from moec.ir.graph import Arg, Dim, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.capacity.choice import chosen
from moec.passes.capacity.seat_ids import SeatIds
from moec.passes.grid.rows import Grid, on_grid
from moec.passes.raising.word_contract import equation_of
from moec.passes.rows.hot import (
    Below,
    Cond,
    Flag,
    Labels,
    Running,
    Seats,
    Source,
    Term,
    floors,
    implied,
    letters_of,
    relabel,
    settled,
    whose,
)
from moec.passes.rows.lift import FLOATS, First, Lift, Lifter, same
from moec.passes.rows.rows import Rows, Special, Token

SPARE = "~"
"""Behind the label of a flat table: it has one row more, for pairs that are dropped."""


@dataclass(frozen=True)
class Returned(Special):
    """Rows of seats taken back by pairs; `axes`: the labels of the leading axes.

    rows  what the table holds          needs  conditions that a pair's weights must be 0 without, one set a term
    """

    rows: Rows
    terms: tuple[Term, ...]
    needs: tuple[frozenset[Cond], ...]
    axes: Labels

    @property
    def sound(self) -> bool:
        """Whether pairs without a seat of their own count for nothing."""
        pairs = zip(self.terms, self.needs, strict=True)
        return all(implied(cond, term.only) for term, need in pairs for cond in need)


def seat_ids(lifter: Lifter, ids: tuple[Arg, ...], table: tuple[Dim, ...]) -> SeatIds | None:
    """One number a pair, or its expert and its place in a table[E, C, H]; axes of size 1 and widths are left out."""
    masks = lifter.masks
    if masks is None:
        return None
    if len(ids) == 2:
        who, where = chosen(masks, ids[0]), masks.lift(ids[1])
        if (
            isinstance(who, NoMatch)
            or not isinstance(where, Running)
            or (who.base, who.axes) != (where.base, where.axes)
        ):
            return None
        return SeatIds(where.base, where.axes, where.place, table[1], where.place.given)
    arg = ids[0]
    made = lifter.instr(arg)
    while made is not None and made.word in ("expand", "repeat"):
        arg = made.args[0]
        made = lifter.instr(arg)
    found = masks.lift(arg)
    return replace(found, axes=tuple(a for a in found.axes if a != "1")) if isinstance(found, SeatIds) else None


def write(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """Tokens put on their seats in zeros, or in a table that others were put in before."""
    if instr.attr("dim") != 0 or not isinstance(instr.args[0], Ref):
        return None
    if instr.word == "index_put":
        base, source, *ids = instr.args
    elif instr.word in ("scatter", "index_add", "scatter_add"):
        base, index, source = instr.args
        ids = [index]
    else:
        return None
    shape, name = instr.types[0].shape, instr.results[0]
    seats = seat_ids(lifter, tuple(ids), shape) if len(ids) <= 2 and instr.types[0].dtype in FLOATS else None
    if seats is None:
        return None
    adds = instr.word.endswith("_add") or (instr.word == "index_put" and bool(instr.attr("accumulate")))
    spare = seats.rest is not None and same(seats.rest, shape[0] - 1) and len(ids) == 1
    experts = shape[0] if len(ids) == 2 else sympy.simplify(floors(shape[0] - int(spare)) / floors(seats.seats))
    sent = _tokens(lifter, source, seats.axes)
    if isinstance(sent, NoMatch):
        return sent
    if not experts.is_Integer:
        return NoMatch(f"{shape[0]} rows are no table of {seats.seats} seats an expert", name, 3)
    if not (not seats.only or spare or (adds and all(implied(c, sent[1]) for c in seats.only))):
        last = _last_spare(seats, shape[1]) if len(ids) == 2 else None
        if last is None:
            return NoMatch("a dropped token is written to the seat of another", name, 3)
        seats, spare = last, True
    x = lifter.type(Ref(sent[0]))
    seats = replace(seats, only=settled(seats.only | sent[1]))
    return _table(lifter, instr, (base, sent[0]), seats, experts, x.rank - 1, spare)


def _last_spare(seats: SeatIds, columns: Dim) -> SeatIds | None:
    """Seats in a table of one more for each expert, where the last is of all whose place it would be or a later one."""
    place = seats.place
    clamps = frozenset(c for c in place.given if not c.witness and c.queue == place.queue and c.bound is not None)
    if place.offset or len(clamps) != 1 or seats.only != clamps:
        return None
    (clamp,) = clamps
    if clamp.bound is None or not same(clamp.bound, columns):
        return None
    free = replace(place, given=place.given - clamps)
    below = replace(clamp, bound=columns - 1, given=free.given)
    return replace(seats, place=free, seats=columns - 1, only=frozenset({below}))


def _table(
    lifter: Lifter, instr: Instr, values: tuple[Arg, str], seats: SeatIds, experts: Dim, tokens: int, spare: bool
) -> Lift:
    """The table after a write of pairs' tokens to their seats."""
    (base, x), name, masks = values, instr.results[0], lifter.masks
    if masks is None or not isinstance(base, Ref):
        return NoMatch("a table of seats without masks", name)
    letters = "".join(letters_of(masks.graph.types[whose(seats.base)].rank))
    term = Term(seats.base, seats.place, seats.seats, seats.only, (), letters[tokens:])
    before = lifter.lift(base)
    terms: tuple[Term, ...] = ()
    layout = f"{'e.c' if len(instr.types[0].shape) == 3 else 'ec'}{SPARE if spare else ''}"
    if isinstance(before, Rows) and before.layout == layout and before.row == Token(x) and before.space.key:
        held = masks.lift(Ref(before.space.key))
        terms = held.terms if isinstance(held, Seats) else ()
    if not terms and not lifter.graph.is_zero(base):
        return NoMatch("tokens are written into something else than zeros", name, 3)
    own = dict(zip(letters_of(tokens), lifter.type(Ref(x)).shape, strict=False))
    sizes = (*own.items(), ("e", experts), ("c", seats.seats))
    key = f"{name} seats"  # the table itself is no mask
    masks.memo[key] = Seats((*letters_of(tokens), "e", "c"), (*terms, term), sizes, True)
    return Rows(Grid("grid", 0, key, sizes=sizes), Token(x), layout)


def _tokens(lifter: Lifter, source: Arg, axes: Labels) -> tuple[str, frozenset[Cond]] | NoMatch:
    """The tokens x that rows for pairs are of, and the conditions without which a row is 0."""
    made, rows = lifter.instr(source), lifter.lift(source)
    miss = NoMatch("rows on seats are not their pairs' tokens", str(source), 3)
    if isinstance(rows, Rows) and isinstance(rows.row, Token) and rows.space.k and not rows.choice:
        order = {"slots": ("ab",) if rows.layout == "flat" else ("a", "b"), "dense": ("ba",)}.get(rows.space.kind)
        return (rows.row.value, frozenset()) if order == axes else miss
    if made is not None and made.word == "mul" and lifter.masks is not None:
        for mask, x in (made.args, made.args[::-1]):
            conds = _conds(lifter.masks.lift(mask), (*axes, "1"))
            inner = _tokens(lifter, x, axes) if conds is not None else miss
            if conds is not None and not isinstance(inner, NoMatch):
                return inner[0], inner[1] | conds
    if isinstance(source, Ref) and len(axes) == lifter.type(source).rank - 1 and axes == letters_of(len(axes)):
        return (source.name, frozenset()) if lifter.type(source).dtype in FLOATS else miss
    return miss


def _conds(mask: Lift, axes: Labels) -> frozenset[Cond] | None:
    """The conditions of a 0/1 mask over pairs."""
    if isinstance(mask, Below) and not mask.negated and mask.axes == axes:
        return frozenset({mask.cond})
    return mask.only if isinstance(mask, Flag) and mask.unit and mask.axes == axes else None


def spared(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """The table without its spare row; a row of zeros put behind it."""
    rows = lifter.lift(instr.args[0][0] if isinstance(instr.args[0], tuple) and instr.args[0] else instr.args[0])
    if not isinstance(rows, Rows) or not on_grid(rows):
        return None
    axis = int(str(instr.attr("dim")))
    plain = {0: "ec", 1: "e.c"}.get(axis, "")  # by the axis that a spare row, or seat, ends
    if rows.layout.removesuffix(SPARE) != plain:
        return None
    if instr.word == "cat":
        parts = instr.args[0]
        if not isinstance(parts, tuple) or len(parts) != 2:
            return None
        zero = lifter.graph.is_zero(parts[1]) and lifter.type(parts[1]).shape[axis] == 1
        return replace(rows, layout=f"{plain}{SPARE}") if zero and rows.layout == plain else None
    size = lifter.type(instr.args[0]).shape[axis]
    whole = same(instr.types[0].shape[axis], size - 1) and (instr.word == "head" or instr.attr("start") == 0)
    if rows.layout != f"{plain}{SPARE}":
        return None
    return replace(rows, layout=plain) if whole else NoMatch("part of a table of seats", instr.results[0], 3)


def read(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """Each pair's row, taken back from its seat."""
    table, *ids = instr.args
    if instr.attr("dim") != 0 or lifter.type(table).dtype not in FLOATS or not 1 <= len(ids) <= 2:
        return None
    seats = seat_ids(lifter, tuple(ids), lifter.type(table).shape)
    rows = lifter.lift(table) if seats is not None else None
    if seats is None or not isinstance(rows, Rows) or not on_grid(rows) or not isinstance(rows.space, Grid):
        return rows if isinstance(rows, NoMatch) else None
    flat = rows.layout.removesuffix(SPARE)
    size = dict(rows.space.sizes)
    if rows.layout == f"e.c{SPARE}" and len(ids) == 2:
        last = _last_spare(seats, lifter.type(table).shape[1])
        if last is None or not same(size["c"], last.seats) or rows.space.k:
            return NoMatch("rows are taken back from another table than their seats", instr.results[0], 3)
        term = Term(last.base, last.place, last.seats, frozenset(), ())
        return Returned(replace(rows, layout=flat), (term,), (last.only,), last.axes)
    if flat != ("e.c" if len(ids) == 2 else "ec") or rows.space.k or not same(size["c"], seats.seats):
        return NoMatch("rows are taken back from another table than their seats", instr.results[0], 3)
    zero = rows.layout.endswith(SPARE) and seats.rest is not None and same(seats.rest, size["e"] * size["c"])
    term = Term(seats.base, seats.place, seats.seats, seats.only if zero else frozenset(), ())
    return Returned(replace(rows, layout=flat), (term,), (seats.only,), seats.axes)


def weigh(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """Rows taken back, times a number for each pair."""
    for value, by in (instr.args, instr.args[::-1]):
        held = lifter.lift(value)
        if not isinstance(held, Returned) or not isinstance(by, Ref):
            continue
        kind = lifter.type(by)
        if kind.rank != len(held.axes) + 1 or kind.shape[-1] != 1 or instr.types[0].rank != kind.rank:
            return NoMatch(f"rows taken back are multiplied by {kind}, expected a number a pair", instr.results[0], 3)
        return _times(lifter, held, by, (*held.axes, "1"))
    return None


def _times(lifter: Lifter, held: Returned, by: Ref, axes: Labels) -> Returned:
    known = lifter.masks.lift(by) if lifter.masks is not None else None
    only: frozenset[Cond] = frozenset()
    if isinstance(known, Below) and not known.negated:
        only = frozenset({known.cond})
    elif isinstance(known, Flag):
        only = known.only
    factor = Source(by.name, axes)
    terms = tuple(replace(t, only=t.only | only, factors=(*t.factors, factor)) for t in held.terms)
    return replace(held, terms=terms)


def added(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """Rows of several choices, added up; 0 where a sum begins."""
    found = [lifter.lift(arg) if isinstance(arg, Ref) else None for arg in instr.args]
    held = [f for f in found if isinstance(f, Returned)]
    if not held:
        return None
    rest = [arg for arg, f in zip(instr.args, found, strict=True) if not isinstance(f, Returned)]
    if any((f.rows, f.axes) != (held[0].rows, held[0].axes) for f in held) or not all(map(lifter.graph.is_zero, rest)):
        return NoMatch("rows of different tables are added", instr.results[0], 3)
    terms = tuple(t for f in held for t in f.terms)
    return replace(held[0], terms=terms, needs=tuple(n for f in held for n in f.needs))


def viewed(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """Another shape or order of the leading axes; another dtype."""
    held = lifter.lift(instr.args[0])
    if not isinstance(held, Returned):
        return None
    if instr.word in ("cast", "same"):
        return held
    if instr.word == "permute":
        dims = instr.numbers("dims")
        if dims[-1] != len(held.axes):
            return NoMatch("the features of rows taken back are moved", instr.results[0], 3)
        return replace(held, axes=tuple(held.axes[d] for d in dims[:-1]))
    base = lifter.graph.types[whose(held.terms[0].base)]
    sizes: dict[str, Dim] = dict(zip(letters_of(base.rank), base.shape, strict=True))
    to, source = instr.types[0].shape, lifter.type(instr.args[0]).shape
    axes = relabel(held.axes, sizes, to[:-1]) if to[-1] == source[-1] else None
    return None if axes is None else replace(held, axes=axes)


def summed(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """Rows taken back, summed over a token's choices."""
    held, dims = lifter.lift(instr.args[0]), instr.attr("dims")
    if not isinstance(held, Returned) or not isinstance(dims, tuple) or len(dims) != 1 or instr.attr("keepdim"):
        return None
    return _sum(lifter, held, int(str(dims[0])), instr.results[0])


def _sum(lifter: Lifter, held: Returned, dim: int, name: str) -> Lift:
    gone = held.axes[dim] if dim < len(held.axes) else "?"
    if any(gone != letters_of(lifter.graph.types[whose(t.base)].rank)[-1] for t in held.terms):
        return NoMatch("rows taken back are summed over something else than a token's choices", name, 3)
    terms = tuple(replace(t, summed=t.summed + gone) for t in held.terms)
    return replace(held, terms=terms, axes=(*held.axes[:dim], *held.axes[dim + 1 :]))


def contracted(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """einsum("tk,tkh->th", w, rows)."""
    (left, right), out = equation_of(instr)
    for x, w, of, at in ((*instr.args, left, right), (*instr.args[::-1], right, left)):
        held = lifter.lift(x)
        if not isinstance(held, Returned) or not isinstance(w, Ref):
            continue
        label = dict(zip(of, held.axes, strict=False))
        gone = [c for c in of if c not in out]
        if set(at) - set(label) or len(gone) != 1 or gone[0] not in at or out != of.replace(gone[0], ""):
            return NoMatch(f"contraction {instr.attr('eq')} of rows taken back", instr.results[0], 3)
        weighed = _times(lifter, held, w, tuple(label[c] for c in at))
        return _sum(lifter, weighed, of.index(gone[0]), instr.results[0])
    return None


FLAT_SEATS: Mapping[str, First] = {
    **dict.fromkeys(("index_put", "scatter", "index_add", "scatter_add"), write),
    **dict.fromkeys(("index", "gather"), read),
    **dict.fromkeys(("reshape", "permute", "cast", "same"), viewed),
    **dict.fromkeys(("cat", "slice", "head"), spared),
    "mul": weigh,
    "add": added,
    "reduce_sum": summed,
    "contract": contracted,
}
"""Tried before the rules of rows; each passes on what it does not know."""


def returned(lifter: Lifter, instr: Instr, roots: frozenset[str]) -> tuple[Rows, Seats] | NoMatch | None:
    """The table and the pairs whose rows come together at `instr`; None where it is no sum of rows taken back."""
    held = lifter.lift_result(instr)
    if not isinstance(held, Returned):
        return None
    for user in lifter.graph.users.get(instr.results[0], ()):
        if user.word in roots and isinstance(lifter.lift_result(user), Returned):
            return NoMatch("part of a longer sum")
    if not held.sound:
        return NoMatch("a dropped token is given the row of another", instr.results[0], 4)
    rows = replace(held.rows, layout="e.c")
    return rows, Seats(held.axes, held.terms, rows.space.sizes if isinstance(rows.space, Grid) else ())
