"""What one element of a tensor is: the program of its row, and which letter each axis runs over.

After lifting, a dense product over all experts, weights that were gathered by an index, weights that were stacked and
the gather of some experts' results have one program; they differ in the letters of their axes alone. Letters are

    0 1 2 …   the own axes of a value that is seen as it is          *   an axis along which nothing changes
    a b d …   the axes of the tokens                                 e   experts, all of them
    A B D …   the axes of the choice; one that meets a letter of the tokens is that letter
    f         features of a row                                      m n the axes of an expert's own parameter
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy

from moec.ir.graph import Dim
from moec.passes.rows.hot import same
from moec.passes.rows.rows import Row, Special

Axis = tuple[tuple[str, Dim], ...]
"""The letters of one axis with their sizes, outermost first; () where its size is 1."""

Axes = tuple[Axis, ...]

TOKENS, CHOICES = "abdgh", "ABDGH"


@dataclass(frozen=True)
class View(Special):
    """A value of the graph with its axes in another order, joined, repeated, or with further ones of size 1."""

    name: str
    axes: Axes


@dataclass(frozen=True)
class Cells(Special):
    """A tensor of rows, or (letters m, n and no f) of experts' parameters.

    choice  the experts that its rows or parameters are of, by letters A, B, …; '' where they are of all, by letter e
    tokens  how many axes the tokens have; 0 where no token is in the program yet
    links   which letter of the tokens a letter of the choice is
    gates   the letters of the numbers that rows were multiplied by
    """

    row: Row
    axes: Axes
    choice: str = ""
    tokens: int = 0
    links: tuple[tuple[str, str], ...] = ()
    gates: tuple[tuple[str, str], ...] = ()

    @property
    def letters(self) -> str:
        """All letters of its axes, in order."""
        return letters_in(self.axes)


def letters_in(axes: Axes) -> str:
    """All letters of the axes, in order."""
    return "".join(letter for axis in axes for letter, _ in axis)


def own_axes(shape: Sequence[Dim], letters: str = "0123456789") -> Axes:
    """Each axis by a letter of its own; none for one of size 1."""
    return tuple(() if d == 1 else ((letters[i], d),) for i, d in enumerate(shape))


def relabel(axes: Axes, shape: Sequence[Dim]) -> Axes | None:
    """The axes after a reshape to `shape`; None where one would be cut otherwise than between letters."""
    letters = [part for axis in axes for part in axis]
    result: list[Axis] = []
    at = 0
    for dim in shape:
        axis: list[tuple[str, Dim]] = []
        size: Dim = sympy.S.One
        while dim != 1 and at < len(letters) and not (axis and same(size, dim)):
            axis.append(letters[at])
            size, at = size * letters[at][1], at + 1
        if not same(size, dim):
            return None
        result.append(tuple(axis))
    return tuple(result) if at == len(letters) else None


@dataclass
class Links:
    """Letters that turned out to be the same."""

    found: dict[str, str]

    def axis(self, left: Axis, right: Axis) -> Axis | None:
        """What an axis is that two values share; None where they disagree."""
        if not left or not right:
            return left or right
        if len(left) != len(right):
            return None
        parts: list[tuple[str, Dim]] = []
        for (a, size), (b, other) in zip(left, right, strict=True):
            letter = self._letter(a, b)
            if not letter or not same(size, other):
                return None
            parts.append((letter, size))
        return tuple(parts)

    def _letter(self, a: str, b: str) -> str:
        a, b = self.found.get(a, a), self.found.get(b, b)
        if a == b or b == "*":
            return a
        if a == "*":
            return b
        if a in CHOICES:
            a, b = b, a
        if a in TOKENS and b in CHOICES and a not in self.found.values():
            self.found[b] = a
            return a
        return ""

    def broadcast(self, left: Axes, right: Axes) -> Axes | None:
        """The axes of a pointwise result."""
        rank = max(len(left), len(right))
        left, right = ((),) * (rank - len(left)) + left, ((),) * (rank - len(right)) + right
        axes = [self.axis(a, b) for a, b in zip(left, right, strict=True)]
        known = [axis for axis in axes if axis is not None]
        return tuple(known) if len(known) == len(axes) else None

    def apply(self, value: Cells) -> Cells:
        """The value with its letters by their new names."""
        if not self.found:
            return value
        axes = tuple(tuple((self.found.get(a, a), d) for a, d in axis) for axis in value.axes)
        gates = tuple((name, "".join(self.found.get(c, c) for c in letters)) for name, letters in value.gates)
        return replace(value, axes=axes, gates=gates, links=tuple(sorted(self.found.items())))


def joined(values: Sequence[Cells]) -> Cells | None:
    """The first value with what all know of choice, tokens, links and gates; None where they disagree."""
    choices = {v.choice for v in values if v.choice}
    counts = {v.tokens for v in values if v.tokens}
    links: dict[str, str] = {}
    for v in values:
        for a, b in v.links:
            if links.setdefault(a, b) != b:
                return None
    if len(choices) > 1 or len(counts) > 1 or len(set(links.values())) < len(links):
        return None
    gates = tuple(dict.fromkeys(g for v in values for g in v.gates))
    return replace(
        values[0],
        choice=next(iter(choices), ""),
        tokens=next(iter(counts), 0),
        links=tuple(sorted(links.items())),
        gates=gates,
    )
