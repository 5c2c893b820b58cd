"""Sums over experts that are written as a chain of additions: 0 + g₀·f₀(x) + g₁·f₁(x) + …

With a column of gates for each slot and expert, Σ_s Σ_e [ids[:, s] = e]·w[:, s]·f_e(x), each slot's sum is over all
experts, and the gates of an expert are the sum of its columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moec.ir.graph import Arg, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.grid.rows import on_grid
from moec.passes.grid.stack import merged
from moec.passes.rows.hot import Hot
from moec.passes.rows.lift import Lifter
from moec.passes.rows.rows import Apply, Cast, Gate, Row, Rows, Special, strip
from moec.passes.rows.sums import APART


@dataclass(frozen=True)
class Slots(Special):
    """Gates that are a sum of masked numbers, one for each slot of a token."""

    parts: tuple[Hot, ...]


def chained(lifter: Lifter, instr: Instr) -> tuple[Rows, None] | NoMatch:
    """0 + rows of expert 0 + rows of expert 1 + …, in any order of addition; with several columns of gates an expert,
    one for each slot, each column's sum is over all experts."""
    found: dict[str, dict[int, Rows]] = {}
    for leaf in _added(lifter, instr):
        if lifter.graph.is_zero(leaf):
            continue
        made = lifter.instr(leaf)
        if made is None or made.word != "mul" or not _one_number(lifter, made):
            return NoMatch("not a sum of experts' gated rows")
        rows = lifter.lift(leaf)
        if not isinstance(rows, Rows) or not on_grid(rows):
            return rows if isinstance(rows, NoMatch) else NoMatch("not a sum of experts' gated rows")
        gate = _gate_in(rows.row)
        if gate is None or gate.at < 0 or gate.at in found.setdefault(gate.value, {}):
            return NoMatch("experts' rows are added without a column of gates each", depth=2)
        found[gate.value][gate.at] = replace(rows, row=_gated_by(rows.row, ""))
    first, *others = found.values()
    if len(first) < 2 or sorted(first) != list(range(len(first))):
        return NoMatch(f"the experts {sorted(first)} are added", depth=2)
    ordered = [first[i] for i in range(len(first))]
    if any(replace(r, row=ordered[0].row) != ordered[0] for r in ordered) or any(other != first for other in others):
        return NoMatch("experts' rows are of other tokens", depth=2)
    row = merged([r.row for r in ordered])
    if isinstance(row, NoMatch):
        return row
    gates = _together(lifter, list(found))
    return gates if isinstance(gates, NoMatch) else (replace(ordered[0], row=_gated_by(row, gates)), None)


def _together(lifter: Lifter, names: list[str]) -> str | NoMatch:
    """One name for gates that are added up."""
    if len(names) == 1 or lifter.masks is None:
        return names[0]
    parts = [lifter.masks.lift(Ref(name)) for name in names]
    known = tuple(part for part in parts if isinstance(part, Hot) and part.place is None)
    if len(known) != len(parts):
        return NoMatch("experts' rows are added with several columns of gates each", depth=2)
    name = " + ".join(names)
    lifter.masks.memo[name] = Slots(known)
    return name


def _added(lifter: Lifter, instr: Instr) -> Iterator[Arg]:
    """What a chain of additions adds, the last first, so that a residual stream is left at its first layer."""
    pending = [instr]
    while pending:
        step = pending.pop()
        for arg in step.args:
            made = lifter.instr(arg)
            inner = made is not None and APART not in dict(made.attrs) and step.args.count(arg) == 1
            if made is not None and made.word == "add" and made.types[0] == instr.types[0] and inner:
                pending.append(made)
            else:
                yield arg


def _one_number(lifter: Lifter, mul: Instr) -> bool:
    """Whether one factor is a number a row."""
    kinds = [lifter.type(a) for a in mul.args]
    return any(k.rank >= 2 and k.shape[-1] == 1 for k in kinds) and len(mul.uses) == 2


def _gate_in(row: Row) -> Gate | None:
    """The column of gates that multiplies a row; None when none does."""
    row = strip(row)
    if isinstance(row, Gate):
        return row
    parts = [_gate_in(arg) for arg in row.args] if isinstance(row, Apply) and row.fn == "mul" else []
    return next((part for part in parts if part is not None), None)


def _gated_by(row: Row, value: str) -> Row:
    """The row with its column of gates by another name."""
    if isinstance(row, Gate):
        return replace(row, value=value)
    if isinstance(row, Cast):
        return replace(row, row=_gated_by(row.row, value))
    if isinstance(row, Apply) and row.fn == "mul":
        at = next((i for i, arg in enumerate(row.args) if _gate_in(arg) is not None), -1)
        return replace(row, args=tuple(_gated_by(arg, value) if i == at else arg for i, arg in enumerate(row.args)))
    return row
