"""What masks of capacity routing mean: which pair of token and slot a number is of, its place in an expert's queue.

A one-hot tensor, and all that is multiplied by it, is zero but where the expert is the pair's own choice; a running
count of such a mask, read there, is the pair's place in its expert's queue; a comparison of that place with the
capacity says whether the pair is kept. Axes are written as labels: the letters a, b, … of the choice's own axes (`ba`:
two of them in one axis, b outermost), `e` expert, `c` seat, `1` an axis of size 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from moec.ir.formulas import at_least
from moec.ir.graph import Dim
from moec.passes.rows.rows import Special

Labels = tuple[str, ...]
"""The labels of a tensor's axes."""


@dataclass(frozen=True)
class Cond:
    """What a pair must meet to count: the 0/1 value `witness` at the pair.

    witness '' : no value says so; it is implied by a condition on the same queue with a bound that is no larger
    queue, bound  when known: for pairs that meet `given`, their place in that queue, from 0, is below the bound
    limit         the witness is a number that must be below the length of the value of this name
    inverse       the witness is 0 at the pairs that meet it
    """

    witness: str
    axes: Labels
    queue: tuple[Pairs, ...] = ()
    bound: Dim | None = None
    given: frozenset[Cond] = frozenset()
    limit: str = ""
    inverse: bool = False


def implied(cond: Cond, known: frozenset[Cond]) -> bool:
    """Whether a condition is one of these, or follows from one: a place in the same queue is below a bound as small."""
    if cond.witness:
        return cond in known
    return any(
        c.queue == cond.queue and c.bound is not None and cond.bound is not None and at_least(cond.bound, c.bound)
        and not c.limit and c.given <= known
        for c in known if c.witness
    )  # fmt: skip


def settled(conds: frozenset[Cond]) -> frozenset[Cond]:
    """The conditions without those that follow from the others."""
    return frozenset(c for c in conds if c.witness or not implied(c, conds))


@dataclass(frozen=True)
class Pairs:
    """The pairs of one choice that meet `only`, in the order of the axes `order` (outermost first).

    The other axes of the choice each have queues of their own (groups of tokens).
    """

    base: str
    order: str
    only: frozenset[Cond] = frozenset()


@dataclass(frozen=True)
class Place:
    """The pair's place: how many pairs come before it in `queue`, plus `offset`; true for pairs that meet `given`."""

    queue: tuple[Pairs, ...]
    offset: int
    given: frozenset[Cond]


@dataclass(frozen=True)
class Source:
    """A value of the graph and the labels of its axes."""

    name: str
    axes: Labels


@dataclass(frozen=True)
class Chosen(Special):
    """The experts that pairs chose, or a view of them."""

    base: str
    axes: Labels


@dataclass(frozen=True)
class Hot(Special):
    """Zero but where the expert is the pair's choice and the pair meets `only`.

    factors  there it is their product, 1 when there are none      place   it is the pair's place there
    summed   axes of the choice that have been summed over: a token's slots
    at       when not −1: the column of that expert alone, without the axis `e`
    """

    base: str
    axes: Labels
    only: frozenset[Cond] = frozenset()
    factors: tuple[Source, ...] = ()
    place: Place | None = None
    summed: str = ""
    at: int = -1

    @property
    def unit(self) -> bool:
        """Whether it is 1 wherever it is not zero."""
        return not self.factors and self.place is None


@dataclass(frozen=True)
class Cold(Special):
    """Where a mask of choices is 0."""

    hot: Hot

    @property
    def axes(self) -> Labels:
        """The labels of its axes: the mask's."""
        return self.hot.axes


@dataclass(frozen=True)
class Sunk(Special):
    """Numbers where a mask of choices is 1, −∞ elsewhere."""

    hot: Hot

    @property
    def axes(self) -> Labels:
        """The labels of its axes: the mask's."""
        return self.hot.axes


@dataclass(frozen=True)
class Flag(Special):
    """A number a pair, or a pair and expert: zero unless the pair meets `only`; `unit`: 1 then."""

    base: str
    axes: Labels
    only: frozenset[Cond]
    source: Source
    unit: bool = False


@dataclass(frozen=True)
class Running(Special):
    """A number a pair and expert, or a pair; for the pair's own expert it is the pair's place."""

    base: str
    axes: Labels
    place: Place
    source: Source = Source("", ())


@dataclass(frozen=True)
class Below(Special):
    """A mask like Running: for the pair's own expert it says that the place in the queue is below `bound`.

    negated  it says that the place is not      inverse  `source` says so
    """

    base: str
    axes: Labels
    place: Place
    bound: Dim
    source: Source
    negated: bool = False
    inverse: bool = False

    @property
    def cond(self) -> Cond:
        """The condition that this mask tells."""
        queue, given = self.place.queue, self.place.given
        return Cond(self.source.name, self.source.axes, queue, self.bound, given, inverse=self.inverse)


@dataclass(frozen=True)
class Totals(Special):
    """How many pairs each expert's queue has."""

    pairs: Pairs
    axes: Labels


@dataclass(frozen=True)
class Spot(Special):
    """Zero but at the pair's place, an axis `c`, and only for pairs that meet `only`."""

    base: str
    axes: Labels
    place: Place
    seats: Dim
    only: frozenset[Cond] = frozenset()
    factors: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Term:
    """Pairs of one choice on their seats; `factors` multiply to the number that each pair brings."""

    base: str
    place: Place
    seats: Dim
    only: frozenset[Cond]
    factors: tuple[Source, ...]
    summed: str = ""


@dataclass(frozen=True)
class Seats(Special):
    """Σ over terms of [expert is the pair's choice]·[seat is the pair's place]·its number.

    mask  it only says where that is not zero, by 1
    """

    axes: Labels
    terms: tuple[Term, ...]
    sizes: tuple[tuple[str, Dim], ...] = ()
    mask: bool = False

    @property
    def unit(self) -> bool:
        """Whether every number is 1 where it is not zero."""
        return self.mask or not any(term.factors for term in self.terms)


def flat(axes: Labels) -> str:
    """All letters of the axes, in order."""
    return "".join(a for a in axes if a != "1")


def whose(base: str) -> str:
    """The choice that `base` names: itself, or %ids where it is `ids[order]`, its rows in another order."""
    return base.partition("[")[0]


def letters_of(count: int) -> Labels:
    """The labels of a choice's own axes."""
    return tuple("abdfg"[:count])


def relabel(axes: Labels, sizes: dict[str, Dim], shape: tuple[Dim, ...]) -> Labels | None:
    """The labels after a reshape to `shape`; None where an axis would be cut otherwise than between letters."""
    letters = [(letter, sizes.get(letter)) for letter in flat(axes)]
    result: list[str] = []
    at = 0
    for i, dim in enumerate(shape):
        left, rest = len(letters) - at, len(shape) - i
        if dim == 1 and not (at < len(letters) and letters[at][1] == 1 and left >= rest):
            result.append("1")
            continue
        label, size = "", sympy.Integer(1)
        while at < len(letters) and (not label or not same(size, dim)):
            letter, own = letters[at]
            if own is None:
                return None
            label, size, at = label + letter, size * own, at + 1
        if not label or not same(size, dim):
            return None
        result.append(label)
    return tuple(result) if at == len(letters) else None


def same(a: Dim | int, b: Dim | int) -> bool:
    """Whether two sizes are provably equal."""
    if a == b:
        return True
    gap = sympy.expand(sympy.sympify(a) - b)
    return gap == 0 or (not gap.is_number and sympy.expand(floors(gap)) == 0)


def floors(size: Dim | int) -> Dim:
    """A size whose whole quotients are floors of exact ones, which sympy can divide and subtract."""
    found: Any = sympy.sympify(size)
    return found.replace(lambda e: type(e).__name__ == "FloorDiv", lambda e: sympy.floor(e.args[0] / e.args[1]))


def broadcast(left: Labels, right: Labels) -> Labels | None:
    """The labels of a broadcast result; None where two different labels meet."""
    rank = max(len(left), len(right))
    left, right = ("1",) * (rank - len(left)) + left, ("1",) * (rank - len(right)) + right
    if any(a != b and "1" not in (a, b) for a, b in zip(left, right, strict=True)):
        return None
    return tuple(b if a == "1" else a for a, b in zip(left, right, strict=True))


def sinks(fill: object, dtype: str) -> bool:
    """Whether a softmax gives 0 to a score of this value: no score of a router comes near it."""
    least = -6e4 if dtype == "f16" else -1e9
    return isinstance(fill, int | float) and not isinstance(fill, bool) and fill <= least
