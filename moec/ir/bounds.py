"""Bounds on the rows of a layer: how many an expert can get, how many are kept, dropped or padded, for any choice.

One formula serves whole numbers and symbols: kernels size their buffers by it, people read it in terms of T.
Letters: T tokens, E experts, k experts a token, C capacity; a pair is one (token, slot).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy

from moec.ir.dims import dim_text
from moec.ir.formulas import at_least, size_of

Size: TypeAlias = Any
"""A whole number, or a sympy expression over whole numbers."""

TOKENS = sympy.Symbol("T", integer=True, nonnegative=True)
"""The letter T in formulas."""


def least(*sizes: Size) -> Size:
    """The smallest."""
    return min(sizes) if _numbers(sizes) else sympy.Min(*sizes)


def most(*sizes: Size) -> Size:
    """The largest."""
    return max(sizes) if _numbers(sizes) else sympy.Max(*sizes)


def floor_div(n: Size, to: int) -> Size:
    """n // to."""
    return n // to if _numbers((n,)) else sympy.floor(sympy.sympify(n) / to)


def ceil_div(n: Size, to: int) -> Size:
    """n / to, rounded up."""
    return -(-n // to) if _numbers((n,)) else sympy.ceiling(sympy.sympify(n) / to)


def up(n: Size, to: int) -> Size:
    """n rounded up to a multiple."""
    return ceil_div(n, to) * to


def plain_bound(size: Size) -> Size:
    """An expression ≥ `size` that is short to read: nothing rounded down, whole coefficients, numbers for `least`."""
    found: Any = sympy.sympify(size)
    found = found.replace(lambda e: isinstance(e, sympy.floor), lambda e: e.args[0])
    found = sympy.expand(found.replace(lambda e: isinstance(e, sympy.Min), _plainest))
    terms = (term.as_coeff_Mul() for term in sympy.Add.make_args(found))
    return sympy.Add(*(sympy.ceiling(number) * rest for number, rest in terms))


def _plainest(smaller: Any) -> Any:
    """One of what a minimum is of: a number, else what is not rounded up where another is."""
    numbers = [arg for arg in smaller.args if arg.is_number]
    whole = [arg for arg in smaller.args if not arg.has(sympy.ceiling)]
    return numbers[0] if numbers else whole[0] if len(whole) < len(smaller.args) and whole else smaller


_SHOWN = {
    "ToFloat": lambda x: x,
    "FloatTrueDiv": lambda a, b: a / b,
    "IntTrueDiv": lambda a, b: a / b,
    "CeilToInt": sympy.ceiling,
    "FloorToInt": sympy.floor,
    "TruncToInt": sympy.floor,
    "FloorDiv": lambda a, b: sympy.floor(a / b),
    "RoundToInt": lambda x: sympy.floor(x + sympy.Rational(1, 2)),
    "Max": sympy.Max,
    "Min": sympy.Min,
}


def shown(size: Size) -> str:
    """A size for people to read: without the conversions that Python's arithmetic makes, floats as short fractions."""
    return dim_text(_shown(sympy.sympify(size)))


def _shown(size: Any) -> Any:
    if size.is_Float:
        return sympy.nsimplify(size, rational=True)
    if not size.args:
        return size
    make: Any = _SHOWN.get(type(size).__name__, size.func)
    return make(*map(_shown, size.args))


def in_tokens(limit: str) -> Size:
    """A formula of T alone, given as text (`moec.ir.formulas.over_tokens`), as an expression of `TOKENS`."""
    formula = size_of(limit)
    return formula.subs({symbol: TOKENS for symbol in formula.free_symbols})


def tokens_to_try(highest: int) -> tuple[int, ...]:
    """Numbers of tokens that stand for all up to `highest`: what a plan decides by T changes at powers of two."""
    return tuple(sorted({1, highest, *(1 << i for i in range(max(highest, 1).bit_length()))}))


def _numbers(sizes: tuple[Size, ...]) -> bool:
    return all(isinstance(size, int) for size in sizes)


@dataclass(frozen=True)
class Choices:
    """T tokens that choose k of E experts each.

    distinct  a token's experts differ from each other, as top-k's do
    limit     rows an expert may get in one queue; the pairs that come later are dropped. None: all are served
    queues    groups of tokens that queue apart: an expert may get `limit` rows of each
    served    known from elsewhere: no expert is chosen by more pairs than its limit
    """

    T: Size
    E: Size
    k: Size
    distinct: bool = False
    limit: Size | None = None
    queues: Size = 1
    served: bool = False

    @property
    def pairs(self) -> Size:
        """T·k."""
        return self.T * self.k

    @property
    def wanted(self) -> Size:
        """The most tokens that one expert can be chosen by: T where choices differ, else T·k."""
        return self.T if self.distinct else self.pairs

    @property
    def seats(self) -> Size | None:
        """The rows an expert may get in all its queues together; None: any number."""
        return None if self.limit is None else self.limit * self.queues

    @property
    def rows(self) -> Size:
        """The most rows of one expert."""
        return self.wanted if self.seats is None else least(self.wanted, self.seats)

    @property
    def hit(self) -> Size:
        """The most experts that get a row."""
        return least(self.E, self.pairs)

    @property
    def kept(self) -> Size:
        """The most pairs that are computed."""
        return self.pairs if self.seats is None else least(self.pairs, self.E * self.rows)

    @property
    def dropped(self) -> Size:
        """The most pairs that the capacity drops: all tokens choose the same experts."""
        if self.seats is None or self.never_drops:
            return 0
        slots = self.k if self.distinct else 1
        return slots * most(0, self.wanted - self.seats)

    @property
    def never_drops(self) -> bool:
        """Whether it is proved for every T that no pair is dropped: C ≥ T·k, or C ≥ T where choices differ."""
        if self.limit is None or self.served:
            return True
        return at_least(sympy.sympify(self.seats), sympy.sympify(self.wanted))

    def tiles(self, block: int) -> Size:
        """The most tiles of `block` rows, each of one expert: Σ ⌈rows/block⌉ over the experts that are hit.

        Σ ⌈n/B⌉ ≤ (Σ n + hit·(B − 1)) / B, and no expert has more than ⌈its most rows / B⌉.
        """
        packed = floor_div(self.kept + self.hit * (block - 1), block)
        return least(packed, self.hit * ceil_div(self.rows, block))

    def padded(self, block: int) -> Size:
        """The most rows with padding to tiles of `block`: at most T·k + E·(block − 1)."""
        return self.tiles(block) * block
