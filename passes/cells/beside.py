"""What stands beside rows in a pointwise function: a vector of their expert, or a number a row."""

from __future__ import annotations

from moec.ir.graph import Ref
from moec.passes.cells.rows import Axes, Cells, Links, View, letters_in
from moec.passes.rows.lift import FLOATS, Lifter
from moec.passes.rows.rows import Expert, Gate, Row, Slot


def aligned(axes: Axes, beside: Axes) -> Axes | None:
    """The axes of an operand with those of size 1 that a broadcast puts before them."""
    return None if len(axes) > len(beside) else ((),) * (len(beside) - len(axes)) + axes


def beside(
    lifter: Lifter, value: Cells | View, mine: Axes, axes: Axes, links: Links, gates: dict[str, str]
) -> tuple[Row, Axes] | None:
    """What stands beside rows: an expert's vector, or a number a row; and the axes of both together."""
    if isinstance(value, Cells):
        return _vector(value.row, mine, axes, links) if isinstance(value.row, Expert) else None
    kind = lifter.type(Ref(value.name))
    if kind.dtype not in FLOATS or "*" in letters_in(value.axes):
        return None
    feature = next((i for i, axis in enumerate(axes) if letters_in((axis,)) == "f"), None)
    if feature is None:  # features share an axis with tokens or experts
        return None
    if mine[feature]:
        return _bias(lifter, value, mine, axes, links)
    held = gate_of(lifter, value, mine, axes, links, gates)
    return None if held is None else (held, axes)


def _vector(row: Expert, mine: Axes, axes: Axes, links: Links) -> tuple[Row, Axes] | None:
    """A vector of the rows' own expert."""
    as_rows = tuple(tuple(("f" if c == "m" else c, d) for c, d in axis) for axis in mine)
    both = links.broadcast(axes, as_rows) if len(row.order) == 1 else None
    return None if both is None else (row, both)


def _bias(lifter: Lifter, value: View, mine: Axes, axes: Axes, links: Links) -> tuple[Row, Axes] | None:
    """b[E, F] beside the rows of all experts; b[F] beside those of one matrix."""
    kind = lifter.type(Ref(value.name))
    single, digits = kind.rank == 1, letters_in(mine)
    if not single and not (kind.rank in (2, 3) and len(digits) == 2 and digits[0] == "0"):
        return None
    if single == ("e" in letters_in(axes)):
        return None
    names = {digits[-1]: "f"} if single else {"0": "e", digits[-1]: "f"}
    own = tuple(tuple((names[c], d) for c, d in axis) for axis in mine)
    both = links.broadcast(axes, own)
    return None if both is None else (Expert((value.name,), (0,), not single), both)


def gate_of(
    lifter: Lifter, value: View, mine: Axes, axes: Axes, links: Links, gates: dict[str, str]
) -> Slot | Gate | None:
    """A number for each row; its letters, which go to `gates`, are those of the rows that it stands beside."""
    if lifter.type(Ref(value.name)).dtype not in FLOATS:
        return None
    letters: dict[str, str] = {}
    for axis, other in zip(mine, axes, strict=True):
        if not axis:
            continue
        if len(axis) != len(other) or any(a[1] != b[1] for a, b in zip(axis, other, strict=True)):
            return None
        letters.update({a: links.found.get(b, b) for (a, _), (b, _) in zip(axis, other, strict=True)})
    if "*" in letters.values() or "f" in letters.values() or value.name in gates:
        return None
    order = "".join(letters[d] for d in sorted(letters))
    gates[value.name] = order
    return Gate(value.name) if "e" in order else Slot(value.name)
