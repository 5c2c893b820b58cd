"""The rules that lift values to cells (`moec.passes.cells.rows`); CELL_RULES is the whole table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import sympy

from moec.ir.expr import POINTWISE
from moec.ir.graph import Arg, Graph, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.cells.beside import aligned, beside
from moec.passes.cells.products import product
from moec.passes.cells.rows import CHOICES, Axes, Cells, Links, View, joined, letters_in, own_axes, relabel
from moec.passes.grid.stack import merged
from moec.passes.raising.word_contract import equation_of
from moec.passes.rows.coded import cast_expert
from moec.passes.rows.lift import FLOATS, INTEGER, Lift, Lifter, Rule
from moec.passes.rows.rows import Apply, Cast, Expert, Number, Row, Slice


def cell_lifter(graph: Graph) -> Lifter:
    """A lifter of cells."""
    return Lifter(graph, CELL_RULES)


def cell(lifter: Lifter, arg: Arg) -> Cells | View | None:
    """What a value is, as it is where no rule says more; None for a literal or what is no tensor."""
    found = lifter.lift(arg)
    if isinstance(found, Cells | View):
        return found
    if not isinstance(arg, Ref) or lifter.type(arg).rank > 9:
        return None
    return View(arg.name, own_axes(lifter.type(arg).shape))


def plain(lifter: Lifter, arg: Arg) -> View | None:
    """A value as it is, whatever made it."""
    return View(arg.name, own_axes(lifter.type(arg).shape)) if isinstance(arg, Ref) else None


def _miss(instr: Instr, why: str) -> NoMatch:
    return NoMatch(why, instr.results[0])


def _viewed(instr: Instr, value: Cells | View | None, axes: Axes | None) -> Lift:
    if value is None or axes is None:
        return _miss(instr, f"`{instr.word}` mixes axes")
    return replace(value, axes=axes)


def rule_reshape(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Axes joined, split between letters, or of size 1; tokens' axes that are joined are one axis of a new value."""
    value = cell(lifter, instr.args[0])
    axes = None if value is None else relabel(value.axes, instr.types[0].shape)
    if isinstance(value, View) and axes is not None:
        last = str(lifter.type(Ref(value.name)).rank - 1)
        if any(len(axis) > 1 and last != axis[-1][0] and "*" not in dict(axis) for axis in axes):
            return _miss(instr, "axes of tokens are joined")
    return _viewed(instr, value, axes)


def rule_permute(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Another order of axes; a bank whose experts' axis was put first is a value of its own."""
    if dict(instr.attrs).get("bank"):
        return _miss(instr, "parameters with experts first")
    value, order = cell(lifter, instr.args[0]), instr.numbers("dims")
    return _viewed(instr, value, None if value is None else tuple(value.axes[d] for d in order))


def rule_expand(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """The same along an axis that was not there, or of size 1."""
    value, to = cell(lifter, instr.args[0]), instr.types[0]
    if value is None:
        return _miss(instr, "no tensor")
    axes = ((),) * (to.rank - len(value.axes)) + value.axes
    return replace(value, axes=tuple(_spread(axis, size) for axis, size in zip(axes, to.shape, strict=True)))


def _spread(axis: tuple[tuple[str, sympy.Expr], ...], size: sympy.Expr) -> tuple[tuple[str, sympy.Expr], ...]:
    return axis or (() if size == 1 else (("*", size),))


def rule_repeat(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """The whole again and again (`repeat`), or each part of it (`repeat_interleave`)."""
    value, shape = cell(lifter, instr.args[0]), lifter.type(instr.args[0]).shape
    if value is None:
        return _miss(instr, "no tensor")
    if instr.word == "repeat_interleave":
        dim, n = int(str(instr.attr("dim"))), instr.attr("repeats")
        reps = [n if i == dim else 1 for i in range(len(shape))]
    else:
        given = instr.attr("reps")
        reps = list(given) if isinstance(given, tuple) else []
    if not all(isinstance(r, int) and r > 0 for r in reps):
        return _miss(instr, "repeated a symbolic number of times")
    axes = ((),) * (len(reps) - len(value.axes)) + value.axes
    made: list[tuple[tuple[str, sympy.Expr], ...]] = []
    for axis, n in zip(axes, reps, strict=True):
        more = () if n == 1 else (("*", sympy.Integer(int(str(n)))),)
        made.append((*axis, *more) if instr.word == "repeat_interleave" else (*more, *axis))
    return replace(value, axes=tuple(made))


def rule_slice(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Some features of every row."""
    value = cell(lifter, instr.args[0])
    dim, start, stop, step = (int(str(instr.attr(n))) for n in ("dim", "start", "stop", "step"))
    if not isinstance(value, Cells) or letters_in(value.axes[dim : dim + 1]) != "f":
        return _miss(instr, "a slice of something else than features")
    axes = (*value.axes[:dim], (("f", instr.types[0].shape[dim]),), *value.axes[dim + 1 :])
    return replace(value, row=Slice(value.row, start, stop, step), axes=axes)


def rule_cast(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Rows or parameters in another dtype."""
    value, to = lifter.lift(instr.args[0]), instr.types[0].dtype
    if isinstance(value, View) and _multiplied(lifter, instr, value):
        return value  # products round what they read
    if not isinstance(value, Cells) or to not in FLOATS:
        return _miss(instr, "a cast of a plain value")
    if isinstance(value.row, Expert):
        cast = cast_expert(instr, value.row)
        return replace(value, row=cast) if isinstance(cast, Expert) else _miss(instr, "a cast of codes")
    return replace(value, row=Cast(value.row, to))


def _multiplied(lifter: Lifter, instr: Instr, view: View) -> bool:
    """Whether a cast is of floats that were repeated, not cast before, and are read by products alone."""
    kinds = {lifter.type(Ref(view.name)).dtype, lifter.type(instr.args[0]).dtype, instr.types[0].dtype}
    users, once = lifter.graph.users.get(instr.results[0], ()), "*" in letters_in(view.axes)
    return once and len(kinds) == 2 and kinds <= FLOATS and all(user.word == "contract" for user in users)


def rule_same(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """The same value under another name."""
    return lifter.lift(instr.args[0])


def rule_reduce(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """A sum over axes of size 1; a product that is summed over one axis."""
    dims = instr.attr("dims")
    value = cell(lifter, instr.args[0])
    if value is None or not isinstance(dims, tuple):
        return _miss(instr, "a sum of no tensor")
    gone = {int(str(d)) for d in dims}
    keep = bool(instr.attr("keepdim"))
    if not any(value.axes[i] for i in gone) and isinstance(value, Cells):
        return replace(value, axes=tuple(a for i, a in enumerate(value.axes) if keep or i not in gone))
    made = lifter.instr(instr.args[0])
    if made is None or made.word != "mul" or len(made.uses) != 2 or keep:
        return _miss(instr, "a sum over other axes")
    rank = made.types[0].rank
    names = "".join(chr(ord("a") + i) for i in range(rank))
    operands = [cell(lifter, arg) for arg in made.args]
    a, b = (v for v in operands)
    if a is None or b is None:
        return _miss(instr, "a sum of no tensors")
    left, right = (names[rank - len(v.axes) :] for v in (a, b))
    return product(lifter, instr, made.args, (left, right, "".join(c for i, c in enumerate(names) if i not in gone)))


def rule_contract(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Rows times matrices; without a sum, a product of each with each."""
    (left, right), out = equation_of(instr)
    found = product(lifter, instr, instr.args, (left, right, out))
    if not isinstance(found, NoMatch) or set(left + right) - set(out):
        return found
    args = [(cell(lifter, arg), letters) for arg, letters in zip(instr.args, (left, right), strict=True)]
    moved = [
        None if v is None else replace(v, axes=tuple(v.axes[at.index(c)] if c in at else () for c in out))
        for v, at in args
    ]
    return _pointwise(lifter, instr, "mul", instr.args, moved)


def rule_pointwise(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """A pointwise function of rows, experts' vectors and numbers."""
    values = [cell(lifter, arg) if isinstance(arg, Ref) else None for arg in instr.args]
    return _pointwise(lifter, instr, instr.word, instr.args, values)


def _pointwise(
    lifter: Lifter, instr: Instr, word: str, args: Sequence[Arg], values: Sequence[Cells | View | None]
) -> Lift:
    rows = [v for v in values if isinstance(v, Cells) and "f" in v.letters]
    if any(r.choice or "e" in r.letters for r in rows):  # what one matrix makes is a token to experts
        values = [
            plain(lifter, a) if isinstance(v, Cells) and not (v.choice or "e" in v.letters) else v
            for v, a in zip(values, args, strict=True)
        ]
        rows = [v for v in values if isinstance(v, Cells) and "f" in v.letters]
    known = joined([*rows, *(v for v in values if isinstance(v, Cells) and v not in rows)]) if rows else None
    if known is None:
        return _miss(instr, f"`{word}` of no rows")
    links = Links(dict(known.links))
    axes: Axes | None = known.axes
    for each in rows[1:]:
        axes = None if axes is None else links.broadcast(axes, each.axes)
    if axes is None:
        return _miss(instr, f"`{word}` of rows on other axes")
    parts: list[Row] = []
    gates = dict(known.gates)
    for arg, value in zip(args, values, strict=True):
        if not isinstance(arg, Ref):
            if isinstance(arg, bool) or not isinstance(arg, (int, float)):
                return _miss(instr, f"`{word}` of {arg!r}")
            parts.append(Number(float(arg)))
        elif isinstance(value, Cells) and "f" in value.letters:
            parts.append(value.row)
        else:
            over = None if value is None else aligned(value.axes, axes)
            held = None if value is None or over is None else beside(lifter, value, over, axes, links, gates)
            if held is None or over is None:
                return _miss(instr, f"`{word}` of rows and {lifter.type(arg)}")
            parts.append(held[0])
            axes = held[1]
    made = replace(known, row=Apply(word, tuple(parts)), axes=axes, gates=tuple(gates.items()))
    return links.apply(made)


def chosen_axes(lifter: Lifter, arg: Arg) -> View | None:
    """Whole numbers that choose experts, their axes by letters of the choice."""
    value = cell(lifter, arg)
    if not isinstance(value, View):
        return None
    kind = lifter.type(Ref(value.name))
    if kind.dtype not in INTEGER or not 1 <= kind.rank <= len(CHOICES):
        return None
    axes = tuple(tuple((CHOICES[int(c)] if c != "*" else c, d) for c, d in axis) for axis in value.axes)
    return View(value.name, axes)


def bank(lifter: Lifter, value: Cells | View | None) -> Cells | None:
    """Parameters of all experts: letters e and m (n); what is no stack of matrices or vectors is none."""
    if isinstance(value, Cells):
        return value if isinstance(value.row, Expert) and "e" in value.letters and not value.choice else None
    if value is None or "*" in letters_in(value.axes):
        return None
    kind, digits = lifter.type(Ref(value.name)), sorted(letters_in(value.axes))
    if kind.rank not in (2, 3) or digits[:1] != ["0"] or not 2 <= len(digits) <= 3 or not kind.shape[0].is_Integer:
        return None
    if kind.dtype in INTEGER and kind.dtype != "i8":
        return None
    names = dict(zip(digits, "emn", strict=False))
    axes = tuple(tuple((names[c], d) for c, d in axis) for axis in value.axes)
    return Cells(Expert((value.name,), tuple(range(len(digits) - 1)), True), axes)


def rule_index(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Parameters of chosen experts, or the rows that they made of each token."""
    table, dim = cell(lifter, instr.args[0]), instr.attr("dim")
    ids = [chosen_axes(lifter, arg) for arg in instr.args[1:]]
    if not isinstance(dim, int) or any(i is None for i in ids):
        return _miss(instr, "indexed by no whole numbers")
    if isinstance(table, View):
        table = bank(lifter, table)
    if table is None or table.choice:
        return _miss(instr, "indexed is no bank of experts")
    places = [i for i in ids if i is not None]
    over = table.axes[dim : dim + len(places)]
    which = [n for n, axis in enumerate(over) if letters_in((axis,)) == "e"]
    if len(which) != 1:
        return _miss(instr, "an index along other axes than the experts'")
    choice, links = places[which[0]], Links({})
    for n, (axis, at) in enumerate(zip(over, places, strict=True)):
        if n != which[0] and not _own_places(lifter, axis, at, choice, links):
            return _miss(instr, "an index of other tokens than the rows are of")
    axes = (*table.axes[:dim], *choice.axes, *table.axes[dim + len(places) :])
    return links.apply(replace(table, axes=axes, choice=choice.name))


def _own_places(lifter: Lifter, axis: tuple[tuple[str, sympy.Expr], ...], at: View, choice: View, links: Links) -> bool:
    """Whether `at` counts the tokens of `axis` along the axis of the index where the choice has them."""
    made = lifter.instr(lifter.graph.behind(Ref(at.name), ("cast", "same")))
    where = [i for i, own in enumerate(at.axes) if letters_in((own,)) not in ("", "*")]
    if not axis:
        return made is not None and made.word == "arange"
    if made is None or made.word != "arange" or len(where) != 1 or len(at.axes) != len(choice.axes):
        return False
    return links.axis(axis, choice.axes[where[0]]) is not None


def rule_gather(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """The rows that chosen experts made, or their parameters, by an index that is the same along all other axes."""
    table, choice, dim = cell(lifter, instr.args[0]), chosen_axes(lifter, instr.args[1]), instr.attr("dim")
    if isinstance(table, View):
        table = bank(lifter, table)
    if table is None or choice is None or table.choice or not isinstance(dim, int):
        return _miss(instr, "gathers something else than experts' rows")
    if letters_in((table.axes[dim],)) != "e" or len(table.axes) != len(choice.axes):
        return _miss(instr, "gathers along another axis than the experts'")
    links, axes = Links({}), list(table.axes)
    sizes = zip(lifter.type(instr.args[0]).shape, instr.types[0].shape, strict=True)
    for i, (axis, (have, want)) in enumerate(zip(choice.axes, sizes, strict=True)):
        if i == dim:
            continue
        if have != want or (letters_in((axis,)) not in ("", "*") and links.axis(axes[i], axis) is None):
            return _miss(instr, "gathers other tokens' rows, or parts of them")
    axes[dim] = choice.axes[dim]
    return links.apply(replace(table, axes=tuple(axes), choice=choice.name))


def rule_stack(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """One expert's rows or parameters after the other's."""
    pieces, dim = instr.args[0], instr.attr("dim")
    if not isinstance(pieces, tuple) or len(pieces) < 2 or not isinstance(dim, int):
        return _miss(instr, "pieces of unknown number")
    found = [_piece(lifter, arg) for arg in pieces]
    cells = [f for f in found if f is not None]
    first = cells[0] if len(cells) == len(pieces) else None
    if first is None or any((c.axes, c.gates) != (first.axes, first.gates) for c in cells):
        return _miss(instr, "pieces of other things than experts' rows")
    row, dim = merged([c.row for c in cells]), dim % instr.types[0].rank
    if isinstance(row, NoMatch):
        return row
    if instr.word == "cat" and first.axes[dim]:
        return _miss(instr, "experts' rows one behind the other")
    mine = ("e", sympy.Integer(len(cells)))
    axes = (*first.axes[:dim], (mine,), *first.axes[dim + (instr.word == "cat") :])
    return replace(first, row=row, axes=axes)


def _piece(lifter: Lifter, arg: Arg) -> Cells | None:
    """What one expert's matrices make of all tokens, or one of its parameters, which must be an input."""
    value = cell(lifter, arg)
    if isinstance(value, Cells):
        return None if value.choice or "e" in value.letters else value
    if value is None or value.name in lifter.graph.defs:
        return None
    digits, kind = sorted(letters_in(value.axes)), lifter.type(Ref(value.name))
    if not 1 <= len(digits) <= 2 or "*" in digits or kind.rank != len(digits):
        return None
    names = dict(zip(digits, "mn", strict=False))
    axes = tuple(tuple((names[c], d) for c, d in axis) for axis in value.axes)
    return Cells(Expert((value.name,), tuple(range(len(digits))), False), axes)


CELL_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(POINTWISE, rule_pointwise),
    "pow": rule_pointwise,
    "reshape": rule_reshape,
    "permute": rule_permute,
    "expand": rule_expand,
    "repeat": rule_repeat,
    "repeat_interleave": rule_repeat,
    "slice": rule_slice,
    "cast": rule_cast,
    "same": rule_same,
    "reduce_sum": rule_reduce,
    "contract": rule_contract,
    "index": rule_index,
    "gather": rule_gather,
    "stack": rule_stack,
    "cat": rule_stack,
}
