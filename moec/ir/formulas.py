"""Sizes as formulas: reading them, and proving that one is at least as large as another for every T.

A capacity is an expression of the user's: a product, rounded by `ceil` or `int`, at least 4, padded to a multiple.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import sympy
from torch.utils._sympy import functions as ts

from moec.ir.dims import dim_text, normal_dim

Dim = sympy.Expr

_NAMES: dict[str, Any] = {name: fn for name, fn in vars(ts).items() if isinstance(fn, type)}
_SLACK = sympy.Rational(1, 10**9)


@lru_cache(maxsize=4096)
def size_of(value: object) -> Dim:
    """A size given as a number or as the text of an expression over symbols; sympy's SympifyError for other text."""
    if isinstance(value, int | float):
        return sympy.nsimplify(value, rational=True)
    return normal_dim(sympy.parse_expr(str(value), local_dict=_NAMES))


def over_tokens(limit: str, tokens: Dim) -> str:
    """The text of a capacity as a formula of T alone, for calls with any T; empty where it is not one.

    `tokens` is what T is in the graph: a symbol or a number.
    """
    formula = size_of(limit)
    if isinstance(tokens, sympy.Symbol):
        mine = [s for s in formula.free_symbols if isinstance(s, sympy.Symbol) and s.name == tokens.name]
        formula = formula.subs({s: sympy.Symbol("T", integer=True, positive=True) for s in mine})
    others = {str(s) for s in formula.free_symbols} - {"T"}
    return "" if others else dim_text(formula).replace(" ", "")


@lru_cache(maxsize=4096)
def capacity_at(limit: str, tokens: int) -> int | None:
    """The value of such a formula for T = tokens; None where it has none."""
    formula = size_of(limit)
    value = formula.subs({s: tokens for s in formula.free_symbols})
    return int(value) if value.is_Integer and value >= 0 else None


@lru_cache(maxsize=4096)
def at_least(a: Dim, b: Dim) -> bool:
    """Whether a ≥ b is proved for all whole numbers ≥ 0 in place of the symbols; b must be a whole number."""
    if sympy.expand(a - b).is_nonnegative:
        return True
    if type(b).__name__ == "Max":
        return all(at_least(a, arg) for arg in b.args)
    if type(b).__name__ == "Min":
        return any(at_least(a, arg) for arg in b.args)
    kind = type(a).__name__
    for part in sympy.Add.make_args(a):  # n·max(p, q) + rest ≥ b where n·p + rest is, or n·q + rest
        number, inner = part.as_coeff_Mul()
        if number > 0 and type(inner).__name__ in ("Max", "Min"):
            enough = any if type(inner).__name__ == "Max" else all
            return enough(at_least(a - part + number * arg, b) for arg in inner.args)
    if kind in ("CeilToInt", "ceiling", "FloorToInt", "TruncToInt", "floor", "ToFloat"):
        return at_least(a.args[0], b)  # ⌊x⌋ ≥ b ⇔ x ≥ b for whole b
    gap = sympy.expand(_bound(a, upper=False) - b)
    return all(term.is_nonnegative or _nonnegative(term) for term in sympy.Add.make_args(gap))


def _nonnegative(term: Any) -> bool:
    """Whether a product of a number and powers of symbols is ≥ 0."""
    number, rest = term.as_coeff_Mul()
    powers = rest.as_powers_dict()
    return bool(number >= 0) and all(base.is_Symbol and exp.is_positive for base, exp in powers.items() if base != 1)


def _bound(a: Any, upper: bool) -> Any:
    """A polynomial that is ≥ a, or ≤ a; what has no such bound stays as it is."""
    kind = type(a).__name__
    if kind == "ToFloat":
        return _bound(a.args[0], upper)
    if kind in ("CeilToInt", "ceiling", "FloorToInt", "TruncToInt", "floor", "RoundToInt"):
        return _rounded(_bound(a.args[0], upper), kind, upper)
    if kind in ("FloatTrueDiv", "IntTrueDiv", "FloorDiv", "CeilDiv") and a.args[1].is_positive and a.args[1].is_number:
        quotient = _bound(a.args[0], upper) / _exact(a.args[1], not upper)
        rounding = {"FloorDiv": "floor", "CeilDiv": "ceiling"}.get(kind)
        return _rounded(quotient, rounding, upper) if rounding else quotient
    if kind in ("Mod", "PythonMod") and a.args[1].is_positive:
        return a.args[1] - 1 if upper else sympy.Integer(0)
    if a.is_Float:
        return _exact(a, upper)
    if isinstance(a, sympy.Add):
        return sympy.Add(*(_bound(arg, upper) for arg in a.args))
    if isinstance(a, sympy.Mul):
        number, rest = a.as_coeff_Mul()
        if not isinstance(rest, sympy.Mul):
            return _exact(number, upper) * _bound(rest, upper == (number >= 0))
    return a


def _rounded(bound: Any, kind: str, upper: bool) -> Any:
    """The bound of a value after it was rounded: rounding up from below, or down from above, keeps the bound."""
    keeps = kind in ("CeilToInt", "ceiling") if not upper else kind in ("FloorToInt", "floor")
    if keeps:
        return bound
    terms: list[tuple[Any, Any]] = [term.as_coeff_Mul() for term in sympy.Add.make_args(sympy.expand(bound))]
    parts = math.lcm(*(int(number.q) for number, _ in terms)) if all(n.is_Rational for n, _ in terms) else 0
    # With denominator d a value is at most (d − 1)/d away from the next whole number.
    away = sympy.Rational(parts - 1, parts) if parts and (parts * bound).is_integer else sympy.Integer(1)
    away = min(away, sympy.Rational(1, 2)) if kind == "RoundToInt" else away
    return bound + away if upper else bound - away


def _exact(number: Any, upper: bool) -> Any:
    """A float as a fraction, a little to the safe side where it is not a short one: rounding must not hide a miss."""
    fraction: Any = sympy.Rational(number)
    if fraction.q <= 2**20:
        return fraction
    return fraction * (1 + _SLACK if upper == (fraction >= 0) else 1 - _SLACK)
