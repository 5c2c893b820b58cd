"""Masks over pairs that no expert serves: where a slot's expert id lies beyond all experts, its row becomes zeros.

lost = ids ≥ E; masked_fill(rows, lost, 0)      →   rows, since the kernels leave such pairs out
bias[clamp_max(ids, E − 1)]                     →   bias[ids], where the rows of such pairs end as zeros

How many experts there are is known once their function is: until then a row carries its mask (`Served`).
"""

from __future__ import annotations

from dataclasses import replace

from moec.ir.graph import Dim, Instr
from moec.ir.match import NoMatch
from moec.passes.rows.lift import Lift, Lifter
from moec.passes.rows.rows import Apply, Cast, Dot, Ids, Lost, Row, Rows, Served, Slice, compatible


def lost_pairs(lifter: Lifter, instr: Instr, _which: int = 0) -> Lost | None:
    """ids ≥ n, ids > n − 1 of the chosen experts of rows."""
    ids, limit = lifter.lift(instr.args[0]), instr.args[1]
    if not isinstance(ids, Ids) or ids.what != "expert" or instr.word not in ("ge", "gt") or type(limit) is not int:
        return None
    return Lost(ids.space, ids.layout, ids.choice, limit + (instr.word == "gt"))


def clamped_ids(lifter: Lifter, instr: Instr, _which: int) -> Lift | None:
    """The chosen experts, those beyond the last counted as the last; that this is of no account is seen later."""
    ids, most = lifter.lift(instr.args[0]), instr.args[1]
    if not isinstance(ids, Ids) or ids.what != "expert" or type(most) is not int:
        return None
    lifter.clamped[ids.choice] = min(most, lifter.clamped.get(ids.choice, most))
    return ids


def rule_masked_fill(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Rows, zeros where nobody serves them."""
    rows, lost, fill = lifter.lift(instr.args[0]), lifter.lift(instr.args[1]), instr.args[2]
    for found in (rows, lost):
        if isinstance(found, NoMatch):
            return found
    if not isinstance(rows, Rows) or not isinstance(lost, Lost) or fill not in (0, 0.0):
        return NoMatch("fills something else than rows of no expert with zeros", instr.results[0])
    alike = rows.layout == lost.layout and compatible(rows.space, lost.space)
    if not alike or (rows.choice and rows.choice != lost.choice) or instr.types[0] != lifter.type(instr.args[0]):
        return NoMatch("fills rows by the choices of others", instr.results[0])
    return replace(rows, row=Served(rows.row, lost.limit), choice=lost.choice)


def unguarded(row: Row) -> tuple[Row, tuple[int, ...], bool]:
    """The row without masks, their limits, and whether it is zeros where nobody serves it."""
    match row:
        case Served(inner, limit):
            bare, limits, _ = unguarded(inner)
            return bare, (limit, *limits), True
        case Cast(inner) | Slice(inner):
            bare, limits, zero = unguarded(inner)
            return replace(row, row=bare), limits, zero
        case Dot(inner):
            bare, limits, _ = unguarded(inner)
            return replace(row, row=bare), limits, False
        case Apply(fn, args):
            parts = [unguarded(arg) for arg in args]
            zero = fn == "mul" and any(zero for *_, zero in parts)
            return Apply(fn, tuple(bare for bare, *_ in parts)), tuple(n for _, some, _ in parts for n in some), zero
        case _:
            return row, (), False


def meets_an_expert(lifter: Lifter, rows: Rows, experts: Dim) -> NoMatch | None:
    """Why a mask or a clamp of a row's expert id is of account, or None."""
    _, limits, zero = unguarded(rows.row)
    clamp = lifter.clamped.get(rows.choice)
    if not limits and clamp is None:
        return None
    if not experts.is_Integer or min(limits, default=int(experts)) < experts:
        return NoMatch(
            f"rows of experts from {min(limits)} on are filled with zeros, of {experts} experts", rows.choice
        )
    if clamp is not None and (clamp < experts - 1 or not zero):
        return NoMatch(f"ids beyond {clamp} count as {clamp}, of {experts} experts", rows.choice)
    return None
