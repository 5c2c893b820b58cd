"""Experts whose rows are stacked one by one, as one value with an axis of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import sympy

from moec.ir.graph import Arg, Instr
from moec.ir.match import NoMatch
from moec.passes.grid.rows import Grid, labels
from moec.passes.rows.hot import flat
from moec.passes.rows.lift import Lift, Lifter
from moec.passes.rows.rows import Expert, Gate, Rows


def rule_stack(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Pieces of one expert each, in expert order, stacked or concatenated along a row axis."""
    pieces, dim, name = instr.args[0], instr.attr("dim"), instr.results[0]
    if not isinstance(pieces, tuple) or not pieces or not isinstance(dim, int):
        return NoMatch("pieces of unknown number", name)
    found = [_piece(lifter, arg, i) for i, arg in enumerate(pieces)]
    misses = [f for f in found if isinstance(f, NoMatch)]
    if misses:
        return misses[0].deeper()
    rows = [f for f in found if isinstance(f, Rows)]
    first = rows[0]
    if any((r.layout, replace(r.space, k=0)) != (first.layout, replace(first.space, k=0)) for r in rows):
        return NoMatch("the stacked pieces have different rows", name, 2)
    row = merged([r.row for r in rows])
    if isinstance(row, NoMatch):
        return row
    axes, dim = list(labels(first)), dim % instr.types[0].rank
    if dim > len(axes) or (instr.word == "cat" and (dim == len(axes) or axes[dim] != "1")):
        return NoMatch("experts' rows are stacked along their features or tokens", name, 2)
    axes[dim : dim + (instr.word == "cat")] = ["e"]
    assert isinstance(first.space, Grid)
    sizes = (*(s for s in first.space.sizes if s[0] != "e"), ("e", sympy.Integer(len(rows))))
    return replace(first, row=row, layout=".".join(axes), space=replace(first.space, k=0, sizes=sizes))


def _piece(lifter: Lifter, arg: Arg, expert: int) -> Lift:
    """Rows of expert number `expert` alone."""
    rows = lifter.lift(arg)
    if isinstance(rows, NoMatch):
        return rows
    if not isinstance(rows, Rows) or not isinstance(rows.space, Grid) or "e" in flat(labels(rows)):
        return NoMatch("a stacked piece is not one expert's rows", str(arg))
    if rows.space.k not in (0, expert + 1):
        return NoMatch(f"piece {expert} is of expert {rows.space.k - 1}", str(arg), 2)
    return rows


def merged(rows: Sequence[Any]) -> Any:
    """One program for E programs of one expert each, in expert order; NoMatch where they differ otherwise."""
    first = rows[0]
    if any(type(r) is not type(first) for r in rows):
        return NoMatch("experts compute different things", depth=3)
    if isinstance(first, Expert):
        return _merged_parameter(rows)
    if isinstance(first, Gate):
        same_gate = all(r.value == first.value and r.at == i for i, r in enumerate(rows))
        return Gate(first.value) if same_gate else NoMatch("experts' gates are not the columns of one tensor", depth=3)
    if isinstance(first, tuple):
        if any(len(r) != len(first) for r in rows):
            return NoMatch("experts compute different things", depth=3)
        parts = [merged([r[i] for r in rows]) for i in range(len(first))]
        return next((p for p in parts if isinstance(p, NoMatch)), tuple(parts))
    if is_dataclass(first) and not isinstance(first, type):
        new = {f.name: merged([getattr(r, f.name) for r in rows]) for f in fields(first)}
        miss = next((v for v in new.values() if isinstance(v, NoMatch)), None)
        return miss if miss is not None else replace(first, **new)
    return first if all(r == first for r in rows) else NoMatch(f"experts differ: {first} and others", depth=3)


def _merged_parameter(rows: Sequence[Expert]) -> Expert | NoMatch:
    first = rows[0]
    if any(r.order != first.order or r.stacked != first.stacked for r in rows):
        return NoMatch("experts' parameters are laid out differently", depth=3)
    if first.stacked:
        own = all(r.values == first.values and r.at == i for i, r in enumerate(rows))
        return replace(first, at=-1) if own else NoMatch("experts do not take their own slices", depth=3)
    if any(len(r.values) != 1 for r in rows):
        return NoMatch("experts' parameters are bound twice", depth=3)
    return replace(first, values=tuple(r.values[0] for r in rows))
