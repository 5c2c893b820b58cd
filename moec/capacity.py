"""Capacity as formulas: bounds that can be proved, rows and workspace an expert, and capacities from recorded loads.

Letters: T tokens, k experts a token, E experts, C capacity (rows an expert may get).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy
from torch.utils._sympy import functions as ts

from moec.dims import normal_dim

Dim = sympy.Expr

_NAMES: dict[str, Any] = {name: fn for name, fn in vars(ts).items() if isinstance(fn, type)}
_SLACK = sympy.Rational(1, 10**9)


@lru_cache(maxsize=4096)
def size_of(value: object) -> Dim:
    """A size given as a number or as the text of an expression over symbols; sympy's SympifyError for other text."""
    if isinstance(value, int | float):
        return sympy.nsimplify(value, rational=True)
    return normal_dim(sympy.parse_expr(str(value), local_dict=_NAMES))


@lru_cache(maxsize=4096)
def at_least(a: Dim, b: Dim) -> bool:
    """Whether a ≥ b is proved for all whole numbers ≥ 0 in place of the symbols; b must be a whole number."""
    if sympy.expand(a - b).is_nonnegative:
        return True
    kind = type(a).__name__
    if kind in ("Max",):
        return any(at_least(arg, b) for arg in a.args)
    if kind in ("Min",):
        return all(at_least(arg, b) for arg in a.args)
    if type(b).__name__ == "Max":
        return all(at_least(a, arg) for arg in b.args)
    if type(b).__name__ == "Min":
        return any(at_least(a, arg) for arg in b.args)
    if kind in ("CeilToInt", "ceiling", "FloorToInt", "TruncToInt", "floor", "ToFloat"):
        return at_least(a.args[0], b)  # ⌊x⌋ ≥ b ⇔ x ≥ b for whole b
    if kind in ("FloorDiv", "CeilDiv"):
        return at_least(_quotient(*a.args), b) if a.args[1].is_positive else False
    gap = sympy.expand(_below(a) - b)
    return all(term.is_nonnegative or _nonnegative(term) for term in sympy.Add.make_args(gap))


def _nonnegative(term: Any) -> bool:
    """Whether a product of a number and powers of symbols is ≥ 0."""
    number, rest = term.as_coeff_Mul()
    powers = rest.as_powers_dict()
    return bool(number >= 0) and all(base.is_Symbol and exp.is_positive for base, exp in powers.items() if base != 1)


def _below(a: Any) -> Any:
    """A polynomial that is ≤ a."""
    kind = type(a).__name__
    if kind in ("CeilToInt", "ceiling", "ToFloat"):
        return _below(a.args[0])
    if kind in ("FloorToInt", "TruncToInt", "floor"):
        return _below(a.args[0]) - 1
    if kind in ("FloatTrueDiv", "IntTrueDiv") and a.args[1].is_number:
        return _below(a.args[0]) / _exact(a.args[1])
    if kind == "CeilDiv":
        return _below(a.args[0]) / a.args[1]
    if kind == "FloorDiv":
        return _below(a.args[0]) / a.args[1] - 1
    if kind in ("Mod", "PythonMod"):
        return sympy.Integer(0)
    if a.is_Float:
        return _exact(a)
    if isinstance(a, sympy.Add):
        return sympy.Add(*map(_below, a.args))
    if isinstance(a, sympy.Mul):
        number, rest = a.as_coeff_Mul()
        if number >= 0 and not isinstance(rest, sympy.Mul):
            return _exact(number) * _below(rest)
    return a


def _exact(number: Any) -> Any:
    """A float as a fraction, a little smaller where it is not a short one, so that rounding cannot hide a miss."""
    fraction: Any = sympy.Rational(number)
    return fraction if fraction.q <= 2**20 else fraction * (1 - _SLACK)


def _quotient(a: Any, b: Any) -> Any:
    return a / b
