"""Codes: matrices kept as small numbers and scales, and how many numbers share a scale. Pure.

A matrix [N, K] is codes[N, K] and scales[⌈N/rows⌉, ⌈K/columns⌉]: w[n, k] = code[n, k] · scale[n // rows, k // columns].
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import sympy

from moec.errors import ParseError

N = TypeVar("N", int, sympy.Expr)  # a size, or its letter
_TEXT = re.compile(r"(int8|fp8)(?::(\d+)(?:x(\d+))?)?|bf16")
LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The largest magnitude of a code."""


@dataclass(frozen=True)
class Coding:
    """element: int8, fp8 (e4m3: 4 bits of exponent, 3 of fraction, no infinity) or bf16, which has no scales.

    rows, columns: a block of the matrix that shares a scale; 0 stands for all there are.
    """

    element: str
    rows: int = 0
    columns: int = 0

    def __str__(self) -> str:
        return self.element if self.element == "bf16" else f"{self.element}:{self.rows}x{self.columns}"

    @staticmethod
    def parse(text: str) -> Coding:
        """`int8` (a scale a row), `int8:N` (for N numbers of a row), `fp8` (for all), `fp8:N` (for N×N), `…:RxC`.

        Raises ParseError.
        """
        return _parse(text)

    @property
    def scaled(self) -> bool:
        """Whether there are scales."""
        return self.element != "bf16"

    def scale_shape(self, rows: N, columns: N) -> tuple[N, N]:
        """The shape of a matrix's scales."""
        return _parts(rows, self.rows), _parts(columns, self.columns)


def _parts(extent: N, block: int) -> N:
    return -(-extent // (block or extent))


@lru_cache(maxsize=256)
def _parse(text: str) -> Coding:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ParseError(f"codes {text!r}: expected bf16, int8, int8:N, fp8, fp8:N or {{int8|fp8}}:ROWSxCOLUMNS")
    element, first, second = match.groups()
    if element is None:
        return Coding("bf16")
    if second is not None:
        return Coding(element, int(first), int(second))
    if element == "int8":
        return Coding("int8", 1, int(first or 0))
    return Coding("fp8", int(first or 0), int(first or 0))
