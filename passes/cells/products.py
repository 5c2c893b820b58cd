"""Products of cells: rows times the matrix of their expert, whichever axes they stand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moec.ir.graph import Arg, Instr, Ref
from moec.ir.match import NoMatch, nearest
from moec.passes.cells.rows import TOKENS, Axis, Cells, Links, View, joined, letters_in, own_axes
from moec.passes.rows.lift import FLOATS, Lift, Lifter
from moec.passes.rows.rows import Apply, Dot, Expert, Gate, Row, Slice, Slot, Token, strip
from moec.passes.rows.rows import Cast as CastRow

Letters = tuple[str, str, str]

MOST = 3
"""The most products one after another in an expert."""


def product(lifter: Lifter, instr: Instr, args: Sequence[Arg], letters: Letters) -> Lift:
    """Σ over one letter of rows times matrices, in either order of the two."""
    left, right, out = letters
    misses: list[NoMatch] = []
    for x, w, row, mat in ((args[0], args[1], left, right), (args[1], args[0], right, left)):
        found = times(lifter, instr, x, w, (row, mat, out))
        if not isinstance(found, NoMatch):
            return found
        misses.append(found)
    return nearest(misses)


def times(lifter: Lifter, instr: Instr, x: Arg, w: Arg, letters: Letters, also: str = "") -> Lift:
    """Rows x times matrices w; `also`: letters that are summed over as well, along which rows are added afterwards."""
    row, mat, out = letters
    held = matrix(lifter, w)
    if held is None:
        return NoMatch("not rows times matrices", instr.results[0])
    rows = rows_of(lifter, x, row, mat, held)
    if rows is None:
        return NoMatch("not rows times matrices", instr.results[0])
    known = joined([rows, held])
    if known is None:
        return NoMatch("rows and matrices are of different choices", instr.results[0])
    at, of = dict(zip(row, rows.axes, strict=True)), dict(zip(mat, held.axes, strict=True))
    gone = [c for c in dict.fromkeys(row + mat) if c not in out + also and (at.get(c) or of.get(c))]
    inner = next((c for c in gone if letters_in((at.get(c, ()),)) == "f" and of.get(c)), "")
    outer = [c for c in mat if letters_in((of[c],)) in ("m", "n") and c != inner]
    if gone != [inner] or len(outer) != 1 or at.get(outer[0]) or letters_in((of[inner],)) not in ("m", "n"):
        return NoMatch("not one row times one matrix", instr.results[0])
    links = Links(dict(known.links))
    axes: list[Axis] = []
    for c in out + also:
        both = links.axis(at.get(c, ()), of.get(c, ())) if c != outer[0] else (("f", of[c][0][1]),)
        if both is None:
            return NoMatch("rows and matrices are on other axes", instr.results[0])
        axes.append(both)
    if known.choice and "e" in letters_in(tuple(axes)):
        return NoMatch("rows of chosen experts meet the matrices of all", instr.results[0])
    assert isinstance(held.row, Expert)
    made = dot(rows.row, held.row, 0 if letters_in((of[inner],)) == "m" else 1)
    if _length(made) > MOST:
        return NoMatch("more products one after another than an expert has", instr.results[0])
    return links.apply(replace(known, row=made, axes=tuple(axes)))


def matrix(lifter: Lifter, arg: Arg) -> Cells | None:
    """Matrices: of chosen experts, of all, or a single one."""
    found = lifter.lift(arg)
    if isinstance(found, Cells):
        return found if isinstance(found.row, Expert) and len(found.row.order) == 2 and found.row.to == "" else None
    if not isinstance(arg, Ref):
        return None
    view = found if isinstance(found, View) else View(arg.name, own_axes(lifter.type(arg).shape))
    digits, kind = sorted(letters_in(view.axes)), lifter.type(Ref(view.name))
    if "*" in digits or len(digits) != kind.rank or kind.rank not in (2, 3) or kind.dtype not in FLOATS:
        return None
    if kind.rank == 3 and not kind.shape[0].is_Integer:
        return None
    names = dict(zip(digits, "emn" if kind.rank == 3 else "mn", strict=True))
    axes = tuple(tuple((names[c], d) for c, d in axis) for axis in view.axes)
    return Cells(Expert((view.name,), (0, 1), kind.rank == 3), axes)


def rows_of(lifter: Lifter, arg: Arg, row: str, mat: str, held: Cells) -> Cells | None:
    """Rows that meet matrices: what experts made so far, or the tokens, which are any value with features last."""
    found = lifter.lift(arg)
    if isinstance(found, Cells) and "f" in found.letters:
        alone = not found.choice and "e" not in found.letters
        if not alone or (not held.choice and "e" not in held.letters):
            return found
        found = None
    if isinstance(found, Cells) or not isinstance(arg, Ref):
        return None
    view = found if isinstance(found, View) else View(arg.name, own_axes(lifter.type(arg).shape))
    kind = lifter.type(Ref(view.name))
    if kind.dtype not in FLOATS or not 2 <= kind.rank <= len(TOKENS):
        return None
    names = {str(i): TOKENS[i] for i in range(kind.rank - 1)} | {str(kind.rank - 1): "f", "*": "*"}
    axes = tuple(tuple((names[c], d) for c, d in axis) for axis in view.axes)
    features = [i for i, axis in enumerate(axes) if letters_in((axis,)) == "f"]
    return Cells(Token(view.name), axes) if len(features) == 1 and row[features[0]] in mat else None


def dot(row: Row, weight: Expert, axis: int) -> Row:
    """A row times a matrix; a number that experts' rows were multiplied by comes behind it."""
    inner = strip(row)
    if isinstance(inner, Apply) and inner.fn == "mul" and _length(inner):
        for factor, rest in (inner.args, inner.args[::-1]):
            if isinstance(strip(factor), Slot | Gate):
                return Apply("mul", (Dot(rest, weight, axis), factor))
    return Dot(row, weight, axis)


def _length(row: Row) -> int:
    """How many products a row's longest path has."""
    match row:
        case Dot(inner):
            return 1 + _length(inner)
        case Apply(_, args):
            return max(map(_length, args), default=0)
        case _:
            return _length(row.row) if isinstance(row, Slice | CastRow) else 0
