"""A range of T, the number of tokens of a call: declared by the option `tokens`, or known from a graph's sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moec.ir.dims import Dim

LIMIT = 2**31
"""Numbers of tokens are below this: indices of tokens are 32 bits wide in some kernels."""


@dataclass(frozen=True)
class TokenRange:
    """low ≤ T ≤ high. Prints as `1..4096`, or as one number where both are the same."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}..{self.high}"

    @staticmethod
    def parse(text: str) -> TokenRange:
        """`1..4096`, or one number; raises ValueError."""
        return _parse(text)

    @staticmethod
    def of_dim(size: Dim, sizes: Any) -> TokenRange | None:
        """The range of a size by what torch's ShapeEnv `sizes` knows of its symbols; None for a number or without ends.

        A user says such a range by `torch._dynamo.mark_dynamic(x, dim, min=1, max=4096)`.
        """
        if sizes is None or not size.free_symbols:
            return None
        known = {symbol.name: symbol for symbol in sizes.var_to_range}
        if any(str(symbol) not in known for symbol in size.free_symbols):
            return None
        expression: Any = size.subs([(symbol, known[str(symbol)]) for symbol in size.free_symbols])
        found = sizes.bound_sympy(expression)
        if not all(end.is_Integer and 0 <= end < LIMIT for end in (found.lower, found.upper)):
            return None
        return TokenRange(int(found.lower), int(found.upper))


@lru_cache(maxsize=256)
def _parse(text: str) -> TokenRange:
    low, dots, high = text.partition("..")
    ends = (low.strip(), high.strip()) if dots else (low.strip(), low.strip())
    numbers = [int(end) for end in ends if end.isascii() and end.isdecimal()]
    if len(numbers) != 2 or not 1 <= numbers[1] < LIMIT or numbers[0] > numbers[1]:
        raise ValueError(f"{text!r}: expected one number of tokens or a range such as 1..4096")
    return TokenRange(*numbers)
