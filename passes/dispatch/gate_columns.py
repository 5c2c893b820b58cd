"""A loop's column of gates that are zero where an expert was not chosen: which tokens it limits a sum to.

g = zeros[…, E].scatter(-1, ids, w); for e: if any: y += g[:, e:e+1] · expert_e(x)
    →   experts(x, g at ids, ids)
"""

from __future__ import annotations

from moec.ir.graph import Ref
from moec.passes.capacity.products import distinct, nonnegative_value
from moec.passes.dispatch.thresholds import Table
from moec.passes.rows.body import BodyMatch
from moec.passes.rows.hot import Hot, flat, letters_of
from moec.passes.rows.lift import Lifter
from moec.passes.rows.rows import Column, Idle
from moec.passes.rows.token_axes import names_once


def chosen_by(lifter: Lifter, gates: str) -> tuple[str, bool]:
    """The choice e[…, k] or e[…] outside of which gates g[…, E] are zero, or ''; whether they are 1 there."""
    held = lifter.masks.lift(Ref(gates)) if lifter.masks is not None else None
    if not isinstance(held, Hot) or held.place is not None or held.at >= 0 or held.base not in lifter.graph.types:
        return "", False
    letters = "".join(letters_of(lifter.graph.types[held.base].rank))
    tokens = flat(tuple(axis for axis in held.axes if axis != "e"))
    once = distinct(lifter.masks, held.base, held.summed) if held.summed and lifter.masks else True
    whole = held.axes[-1:] == ("e",) and tokens + held.summed == letters and once
    found = held.base if whole and names_once(lifter.graph, held.base) else ""
    return found, bool(found) and held.unit and not held.only


def has_gates(lifter: Lifter, held: Column) -> Idle | None:
    """g[:, e].sum(), compared with 0: whether some gate of the loop's expert is above it, where none is below."""
    if not nonnegative_value(lifter.graph, held.value):
        return None
    table = Table(held.value, "gt", 0.0)
    lifter.tables[table.name] = table
    return Idle(held.key, False, table.name)


def leaves_out_zeros(lifter: Lifter, asked: str, choice: str, body: BodyMatch) -> bool:
    """Whether an expert that is passed over by gates has no rows by the choice, or rows of weight 0 alone."""
    table = lifter.tables.get(asked)
    if not isinstance(table, Table) or table.limit != 0.0 or table.word not in ("gt", "ne"):
        return False
    if chosen_by(lifter, table.value) == (choice, True):
        return True
    if not body.by_expert or table.value != body.weight or body.spec.weight_on != "output":
        return False
    return table.word == "ne" or nonnegative_value(lifter.graph, table.value)
