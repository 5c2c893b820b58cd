"""Sizes: sympy expressions in a normal form whose text reads back as the same expression."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter
from torch.utils._sympy import functions as ts

from moec.ir.lex import Reader, word_text

Dim = sympy.Expr

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "Max": ts.Max,
    "Min": ts.Min,
    "Mod": ts.Mod,
    "PythonMod": ts.PythonMod,
    "FloorDiv": ts.FloorDiv,
    "CleanDiv": ts.CleanDiv,
    "CeilDiv": ts.CeilDiv,
    "ModularIndexing": ts.ModularIndexing,
    "PowByNatural": ts.PowByNatural,
    "IntTrueDiv": ts.IntTrueDiv,
    "FloatTrueDiv": ts.FloatTrueDiv,
    "FloorToInt": ts.FloorToInt,
    "CeilToInt": ts.CeilToInt,
    "TruncToInt": ts.TruncToInt,
    "RoundToInt": ts.RoundToInt,
    "ToFloat": ts.ToFloat,
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "Abs": sympy.Abs,
    "sqrt": sympy.sqrt,
}
"""The functions that may occur in a size: those of torch's shape environment, by the names that they print with."""


@lru_cache(maxsize=4096)
def symbol(name: str) -> sympy.Symbol:
    """The plain integer symbol of this name; two of one name are equal."""
    return sympy.Symbol(name, integer=True)


@lru_cache(maxsize=4096)
def normal_dim(expr: sympy.Expr | int) -> sympy.Expr:
    """The expression over plain integer symbols and torch's own functions, so that equal texts are equal values."""
    found: Any = sympy.sympify(expr)
    if isinstance(found, sympy.Symbol):
        return symbol(found.name)
    if not found.args:
        return found
    make = FUNCTIONS.get(type(found).__name__, found.func)
    return make(*map(normal_dim, found.args))


class _Printer(StrPrinter):
    """sympy's own text, except that torch's functions do not print themselves: theirs do not read back."""

    printmethod = "_moec_text"

    def _print_FloorDiv(self, expr: Any) -> str:
        if type(expr) is not ts.FloorDiv:
            return self._print_Function(expr)
        base, divisor = (self.parenthesize(arg, PRECEDENCE["Mul"]) for arg in expr.args)
        return f"{base}//{divisor}"

    def _print_Symbol(self, expr: Any) -> str:
        return word_text(expr.name)


@lru_cache(maxsize=65536)
def dim_text(expr: sympy.Expr | int) -> str:
    """The size as text: `8*T`, `(s0 + 1)//2`, `Max(1, s0)`."""
    return _Printer().doprint(expr)


def read_dim(reader: Reader) -> sympy.Expr:
    """The size that comes next; ParseError."""
    total = -_product(reader) if reader.accept("-") else _product(reader)
    while reader.sees("+") or reader.sees("-"):
        plus = reader.take().text == "+"
        term = _product(reader)
        total = total + term if plus else total - term
    return total


def _product(reader: Reader) -> Any:
    result = _power(reader)
    while reader.sees("*") or reader.sees("//") or reader.sees("/"):
        mark = reader.take()
        factor = _power(reader)
        if mark.text != "*" and factor.is_zero:
            reader.fail("a divisor other than 0", mark)
        result = _PRODUCTS[mark.text](result, factor)
    return result


_PRODUCTS: Mapping[str, Callable[[Any, Any], Any]] = {"*": operator.mul, "/": operator.truediv, "//": ts.FloorDiv}


def _power(reader: Reader) -> Any:
    base = _atom(reader)
    if not reader.accept("**"):
        return base
    return base ** (-_atom(reader) if reader.accept("-") else _atom(reader))


def _atom(reader: Reader) -> Any:
    token = reader.peek
    if token.kind == "number" and token.text.isdigit():
        return _integer(reader.take().text)
    if token.kind == "number" and token.text.count(".") == 1:
        return sympy.Float(reader.take().text)  # a factor of a capacity, before it is rounded
    if reader.accept("("):
        inner = read_dim(reader)
        reader.expect(")")
        return inner
    if token.kind not in ("name", "string"):
        reader.fail("a size: a whole number, a symbol or a bracket")
    name = reader.word()
    if not (reader.sees("(") and token.kind == "name"):
        return symbol(name)
    if name not in FUNCTIONS:
        reader.fail(f"one of the functions {', '.join(FUNCTIONS)}", token)
    reader.take()
    args = [read_dim(reader)]
    while reader.accept(","):
        args.append(read_dim(reader))
    reader.expect(")")
    try:
        return FUNCTIONS[name](*args)
    except (TypeError, ValueError, ZeroDivisionError, AssertionError):
        reader.fail(f"arguments that {name} takes", token, f"({', '.join(map(dim_text, args))})")


@lru_cache(maxsize=65536)
def _integer(text: str) -> sympy.Integer:
    return sympy.Integer(int(text))
