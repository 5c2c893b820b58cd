"""Where rows of chosen experts come together, read off letters: a sum over slots, or one expert a token and none."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from moec.ir.graph import Arg, Dim, Graph, Instr, Ref
from moec.ir.match import NoMatch, nearest
from moec.passes.cells.beside import gate_of
from moec.passes.cells.products import times
from moec.passes.cells.rows import CHOICES, TOKENS, Axes, Cells, Links, letters_in
from moec.passes.cells.rules import cell, plain
from moec.passes.grid.rows import Grid
from moec.passes.raising.word_contract import equation_of
from moec.passes.rows.lift import Lifter
from moec.passes.rows.pairs import Writer
from moec.passes.rows.rows import Apply, Rows

SUMS = frozenset({"reduce_sum", "contract"})
"""Words that may sum rows over slots or experts."""

LAST = frozenset({"mul", "add", "contract", "index", "gather", "reshape", "permute", "cast", "reduce_sum", "div"})
"""Words that may be the last of what one expert a token computes."""


@dataclass(frozen=True)
class Total:
    """Rows [tokens…, f] after a sum over `slots` ('' where a token has one expert), or over all experts ('e')."""

    cells: Cells
    before: Axes
    slots: str


def summed(lifter: Lifter, instr: Instr) -> Total | NoMatch:
    """The sum over slots or experts that `instr` is."""
    found = _reduced(lifter, instr) if instr.word == "reduce_sum" else _contracted(lifter, instr)
    if isinstance(found, NoMatch):
        return found
    cells, before = found
    gone = [c for c in letters_in(before) if c not in cells.letters]
    if len(gone) != 1:
        return NoMatch(f"rows are summed over {len(gone)} axes, expected the slots or the experts", instr.results[0], 2)
    return _total(lifter, instr, Total(cells, before, gone[0]))


def unsummed(lifter: Lifter, instr: Instr) -> Total | NoMatch:
    """The rows of one expert a token, which nothing sums, where no further step of an expert follows."""
    cells = lifter.lift(Ref(instr.results[0]))
    if not isinstance(cells, Cells) or not cells.choice or "f" not in cells.letters:
        return cells if isinstance(cells, NoMatch) else NoMatch("not the rows of chosen experts", instr.results[0])
    for user in lifter.graph.users.get(instr.results[0], ()):
        if any(isinstance(lifter.lift(Ref(name)), Cells) for name in user.results):
            return NoMatch("a step on an expert's way", instr.results[0])
    return _total(lifter, instr, Total(cells, cells.axes, ""))


def _total(lifter: Lifter, instr: Instr, total: Total) -> Total | NoMatch:
    cells, left = total.cells, total.cells.letters
    if left[-1:] != "f" or list(left[:-1]) != sorted(left[:-1]) or set(left[:-1]) - set(TOKENS):
        return NoMatch("experts' rows come together in another order than the tokens", instr.results[0], 2)
    if total.slots == "e":
        return total if not cells.choice else NoMatch("chosen rows are summed over experts", instr.results[0], 2)
    if not cells.choice or slots_in(lifter.graph, cells) != total.slots:
        return NoMatch("the sum is not over the slots of a token", instr.results[0], 2)
    return total


def choice_letters(graph: Graph, cells: Cells) -> str:
    """The letters of the choice's axes, which are those of tokens where they met."""
    links, shape = dict(cells.links), graph.types[cells.choice].shape
    return "".join(links.get(CHOICES[i], CHOICES[i]) for i, d in enumerate(shape) if d != 1)


def slots_in(graph: Graph, cells: Cells) -> str:
    """The letters of a choice that are no tokens'."""
    return "".join(c for c in choice_letters(graph, cells) if c in CHOICES)


def _reduced(lifter: Lifter, instr: Instr) -> tuple[Cells, Axes] | NoMatch:
    """rows[…].sum(slots)."""
    rows, dims = lifter.lift(instr.args[0]), instr.attr("dims")
    if not isinstance(rows, Cells) or not isinstance(dims, tuple) or "f" not in rows.letters:
        return rows if isinstance(rows, NoMatch) else NoMatch("not a sum of experts' rows")
    keep = bool(instr.attr("keepdim"))
    left = (() if i in dims else axis for i, axis in enumerate(rows.axes) if keep or i not in dims)
    return replace(rows, axes=tuple(left)), rows.axes


def _contracted(lifter: Lifter, instr: Instr) -> tuple[Cells, Axes] | NoMatch:
    """einsum of rows and their weights, or of weighted rows and their experts' last matrices."""
    (left, right), out = equation_of(instr)
    misses: list[NoMatch] = []
    for x, other, row, at in ((*instr.args, left, right), (*instr.args[::-1], right, left)):
        found = _weighted(lifter, x, other, (row, at, out))
        if isinstance(found, NoMatch):
            misses.append(found)
            found = _multiplied(lifter, instr, x, other, (row, at, out))
        if not isinstance(found, NoMatch):
            return found
        misses.append(found)
    return nearest(misses)


def _weighted(lifter: Lifter, x: Arg, gates: Arg, letters: tuple[str, str, str]) -> tuple[Cells, Axes] | NoMatch:
    row, at, out = letters
    rows, numbers = lifter.lift(x), cell(lifter, gates)
    if not isinstance(rows, Cells) or "f" not in rows.letters or not (rows.choice or "e" in rows.letters):
        return rows if isinstance(rows, NoMatch) else NoMatch("not a weighted sum of experts' rows")
    if isinstance(numbers, Cells):
        numbers = None if numbers.choice or "e" in numbers.letters else plain(lifter, gates)
    if numbers is None or any(numbers.axes[at.index(c)] for c in set(at) - set(row)):
        return NoMatch("not a weighted sum of experts' rows")
    mine = tuple(numbers.axes[at.index(c)] if c in at else () for c in row)
    links, known = Links(dict(rows.links)), dict(rows.gates)
    held = gate_of(lifter, numbers, mine, rows.axes, links, known)
    if held is None:
        return NoMatch("rows are weighted by other numbers than one a row", depth=2)
    both = links.apply(replace(rows, row=Apply("mul", (rows.row, held)), gates=tuple(known.items()), axes=rows.axes))
    by = dict(zip(row, both.axes, strict=True))
    return replace(both, axes=tuple(by.get(c, ()) for c in out)), both.axes


def _multiplied(
    lifter: Lifter, instr: Instr, x: Arg, w: Arg, letters: tuple[str, str, str]
) -> tuple[Cells, Axes] | NoMatch:
    row, mat, out = letters
    also = "".join(c for c in row if c in mat and c not in out)
    misses: list[NoMatch] = []
    for c in also:
        found = times(lifter, instr, x, w, letters, c)
        if isinstance(found, Cells) and found.axes[-1]:
            return replace(found, axes=found.axes[:-1]), found.axes
        if isinstance(found, NoMatch):
            misses.append(found)
    return nearest(misses or [NoMatch("not a sum of experts' rows")])


def on_grid(total: Total) -> Rows:
    """The rows of all experts, as `moec.passes.grid.rows` says them."""
    sizes = tuple(part for axis in total.before for part in axis if part[0] != "f")
    labels = [letters_in((axis,)) or "1" for axis in total.before if letters_in((axis,)) != "f"]
    return Rows(Grid("grid", 0, "", sizes=sizes), total.cells.row, ".".join(labels))


def pairs_of(out: Writer, total: Total, value: str, letters: str, token: str) -> str:
    """A value with the given letters as [T, k]: one number for each token and slot."""
    x, cells = out.graph.types[token], total.cells
    names = [(TOKENS[i], d) for i, d in enumerate(x.shape[:-1]) if d != 1]
    slots = [(total.slots, _size(out.graph, cells, total.slots))] if total.slots else []
    wanted = [*names, *slots]
    value = out.column(value)
    given = dict(zip(letters, (d for d in out.type(value).shape if d != 1), strict=True))
    value = out.reshape(value, tuple(given.values()))
    order = [c for c, _ in wanted if c in given]
    value = out.permute(value, [letters.index(c) for c in order])
    if len(order) < len(wanted):
        lead = [(TOKENS[i], d) for i, d in enumerate(x.shape[:-1])]
        value = out.reshape(value, tuple(d if c in given else sympy.S.One for c, d in (*lead, *slots)))
        value = out.expand_over(value, token, (*x.shape[:-1], *(d for _, d in slots)))
    count = slots[0][1] if slots else sympy.S.One
    return out.reshape(value, (sympy.Mul(*x.shape[:-1]), count))


def _size(graph: Graph, cells: Cells, letter: str) -> Dim:
    shape = graph.types[cells.choice].shape
    return shape[CHOICES.index(letter)]
