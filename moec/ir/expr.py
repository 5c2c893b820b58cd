"""Pointwise expressions: frozen trees that print, parse back, differentiate and evaluate.

An expert's activation is one such tree over the projections of its row: `mul(silu(a), b)` is SwiGLU,
where `a` is the first (or only) projection and `b` the second. Kernels emit it as C++ or Triton,
the eager twin evaluates it with torch, and the backward pass uses its derivative.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce

import torch

from moec.errors import ParseError


@dataclass(frozen=True)
class Var:
    """A named input."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Const:
    """A number, kept as a Python float."""

    value: float

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class Call:
    """A pointwise function of `POINTWISE` applied to expressions."""

    fn: str
    args: tuple[Expr, ...]

    def __str__(self) -> str:
        return f"{self.fn}({', '.join(map(str, self.args))})"


Expr = Var | Const | Call


def call(fn: str, *args: Expr) -> Call:
    """A call with its arity checked."""
    if fn not in POINTWISE:
        raise ParseError(f"unknown pointwise function {fn!r}; known: {', '.join(POINTWISE)}")
    arity = POINTWISE[fn].arity
    if arity != len(args):
        raise ParseError(f"pointwise function {fn!r} takes {arity} arguments, got {len(args)}")
    return Call(fn, args)


@dataclass(frozen=True)
class Pointwise:
    """What moec knows of one pointwise function: its arity, eager meaning and partial derivatives."""

    arity: int
    eager: Callable[..., torch.Tensor]
    partials: Callable[..., tuple[Expr, ...]]


_ONE = Const(1.0)
_ZERO = Const(0.0)


def _mul(x: Expr, y: Expr) -> Expr:
    if _ZERO in (x, y):
        return _ZERO
    if x == _ONE:
        return y
    return x if y == _ONE else Call("mul", (x, y))


def _add(x: Expr, y: Expr) -> Expr:
    if x == _ZERO:
        return y
    return x if y == _ZERO else Call("add", (x, y))


def _neg(x: Expr) -> Expr:
    return Call("neg", (x,))


def _d_sigmoid(x: Expr) -> Expr:
    s = Call("sigmoid", (x,))
    return Call("mul", (s, Call("sub", (_ONE, s))))


def _d_silu(x: Expr) -> Expr:
    s = Call("sigmoid", (x,))
    return Call("add", (s, Call("mul", (x, _d_sigmoid(x)))))


def _d_tanh(x: Expr) -> Expr:
    t = Call("tanh", (x,))
    return Call("sub", (_ONE, Call("mul", (t, t))))


_SQRT_2_OVER_PI = 0.7978845608028654
_SQRT_1_OVER_2 = 0.7071067811865476


def _d_gelu(x: Expr) -> Expr:
    """d/dx of x·Φ(x) = Φ(x) + x·φ(x)."""
    cdf = Call("mul", (Const(0.5), Call("add", (_ONE, Call("erf", (Call("mul", (x, Const(_SQRT_1_OVER_2))),))))))
    pdf = Call("mul", (Const(0.3989422804014327), Call("exp", (Call("mul", (Const(-0.5), Call("mul", (x, x)))),))))
    return Call("add", (cdf, Call("mul", (x, pdf))))


def _d_gelu_tanh(x: Expr) -> Expr:
    x2 = Call("mul", (x, x))
    inner = Call(
        "mul", (Const(_SQRT_2_OVER_PI), Call("mul", (x, Call("add", (_ONE, Call("mul", (Const(0.044715), x2)))))))
    )
    t = Call("tanh", (inner,))
    left = Call("mul", (Const(0.5), Call("add", (_ONE, t))))
    slope = Call("mul", (Const(_SQRT_2_OVER_PI), Call("add", (_ONE, Call("mul", (Const(3 * 0.044715), x2))))))
    right = Call("mul", (Call("mul", (Const(0.5), x)), Call("mul", (_d_tanh(inner), slope))))
    return Call("add", (left, right))


def _where_ge(x: Expr, y: Expr) -> Expr:
    """1 where x >= y, else 0."""
    return Call("ge", (x, y))


def _share(x: Expr, y: Expr) -> Expr:
    """1 where x > y, ½ at a tie, else 0: torch splits the gradient of maximum and minimum evenly at ties."""
    return Call("mul", (Const(0.5), Call("add", (Call("ge", (x, y)), Call("gt", (x, y))))))


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x rounded to what `dtype` holds; a reference in fp64 is not rounded at all."""
    return x if x.dtype == torch.float64 else x.to(dtype).to(x.dtype)


POINTWISE: Mapping[str, Pointwise] = {
    "add": Pointwise(2, torch.add, lambda x, y: (_ONE, _ONE)),
    "sub": Pointwise(2, torch.sub, lambda x, y: (_ONE, Const(-1.0))),
    "mul": Pointwise(2, torch.mul, lambda x, y: (y, x)),
    "div": Pointwise(2, torch.div, lambda x, y: (Call("div", (_ONE, y)), _neg(Call("div", (x, Call("mul", (y, y))))))),
    "neg": Pointwise(1, torch.neg, lambda x: (Const(-1.0),)),
    "exp": Pointwise(1, torch.exp, lambda x: (Call("exp", (x,)),)),
    "log": Pointwise(1, torch.log, lambda x: (Call("div", (_ONE, x)),)),
    "log1p": Pointwise(1, torch.log1p, lambda x: (Call("div", (_ONE, Call("add", (_ONE, x)))),)),
    "sqrt": Pointwise(1, torch.sqrt, lambda x: (Call("div", (Const(0.5), Call("sqrt", (x,)))),)),
    "abs": Pointwise(1, torch.abs, lambda x: (Call("sub", (Call("gt", (x, _ZERO)), Call("gt", (_neg(x), _ZERO)))),)),
    "erf": Pointwise(
        1,
        torch.erf,
        lambda x: (Call("mul", (Const(1.1283791670955126), Call("exp", (_neg(Call("mul", (x, x))),)))),),
    ),
    "tanh": Pointwise(1, torch.tanh, lambda x: (_d_tanh(x),)),
    "sigmoid": Pointwise(1, torch.sigmoid, lambda x: (_d_sigmoid(x),)),
    "silu": Pointwise(1, torch.nn.functional.silu, lambda x: (_d_silu(x),)),
    "softplus": Pointwise(1, torch.nn.functional.softplus, lambda x: (Call("sigmoid", (x,)),)),
    "relu": Pointwise(1, torch.relu, lambda x: (Call("gt", (x, _ZERO)),)),
    "gelu": Pointwise(1, torch.nn.functional.gelu, lambda x: (_d_gelu(x),)),
    "gelu_tanh": Pointwise(1, lambda x: torch.nn.functional.gelu(x, approximate="tanh"), lambda x: (_d_gelu_tanh(x),)),
    # torch passes the gradient of clamp through on the boundary itself, hence >= and <=.
    "clamp_min": Pointwise(2, torch.clamp, lambda x, lo: (_where_ge(x, lo), Call("gt", (lo, x)))),
    "clamp_max": Pointwise(
        2, lambda x, hi: torch.clamp(x, max=hi), lambda x, hi: (_where_ge(hi, x), Call("gt", (x, hi)))
    ),
    # A step that a model computes in half precision, inside of an expression in fp32.
    "round_bf16": Pointwise(1, lambda x: _rounded(x, torch.bfloat16), lambda x: (_ONE,)),
    "round_f16": Pointwise(1, lambda x: _rounded(x, torch.float16), lambda x: (_ONE,)),
    "maximum": Pointwise(2, torch.maximum, lambda x, y: (_share(x, y), _share(y, x))),
    "minimum": Pointwise(2, torch.minimum, lambda x, y: (_share(y, x), _share(x, y))),
    "ge": Pointwise(2, lambda x, y: torch.ge(x, y).to(torch.float32), lambda x, y: (_ZERO, _ZERO)),
    "gt": Pointwise(2, lambda x, y: torch.gt(x, y).to(torch.float32), lambda x, y: (_ZERO, _ZERO)),
}


def derivative(expr: Expr, wrt: str) -> Expr:
    """The partial derivative of `expr` by the variable named `wrt`."""
    if isinstance(expr, Var):
        return _ONE if expr.name == wrt else _ZERO
    if isinstance(expr, Const):
        return _ZERO
    partials = POINTWISE[expr.fn].partials(*expr.args)
    terms = (_mul(partial, derivative(arg, wrt)) for partial, arg in zip(partials, expr.args, strict=True))
    return reduce(_add, terms, _ZERO)


def evaluate(expr: Expr, env: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The value of `expr` with torch, in the dtype of the tensors given; each must broadcast with the others."""
    like = next(iter(env.values()))
    memo: dict[Expr, torch.Tensor] = {}

    def value(e: Expr) -> torch.Tensor:
        if isinstance(e, Var):
            return env[e.name]
        if isinstance(e, Const):
            return like.new_full((), e.value)
        if e not in memo:
            memo[e] = POINTWISE[e.fn].eager(*(value(arg) for arg in e.args)).to(like.dtype)
        return memo[e]

    return value(expr)


def substituted(expr: Expr, values: Mapping[str, Expr]) -> Expr:
    """`expr` with expressions in the place of some of its variables."""
    if isinstance(expr, Var):
        return values.get(expr.name, expr)
    if isinstance(expr, Const):
        return expr
    return Call(expr.fn, tuple(substituted(arg, values) for arg in expr.args))


def variables(expr: Expr) -> frozenset[str]:
    """The names of the variables that occur in `expr`."""
    if isinstance(expr, Var):
        return frozenset((expr.name,))
    if isinstance(expr, Const):
        return frozenset()
    return frozenset().union(*map(variables, expr.args))


_TOKEN = re.compile(r"\s*([A-Za-z_]\w*|-?(?:inf|nan|\d[\d.]*(?:[eE][-+]?\d+)?)|[(),])")


def parse(text: str) -> Expr:
    """The expression that prints as `text`; raises ParseError with the position."""
    expr, end = _parse_at(text, 0)
    if text[end:].strip():
        raise ParseError(f"expression {text!r}: expected its end at column {end}, got {text[end:]!r}")
    return expr


def _token(text: str, at: int) -> tuple[str, int]:
    match = _TOKEN.match(text, at)
    if match is None:
        raise ParseError(f"expression {text!r}: expected a name, a number or a bracket at column {at}")
    return match.group(1), match.end()


def _number(text: str, token: str, end: int) -> Const:
    try:
        return Const(float(token))
    except ValueError:
        raise ParseError(
            f"expression {text!r}: expected a number at column {end - len(token)}, got {token!r}"
        ) from None


def _parse_at(text: str, at: int) -> tuple[Expr, int]:
    token, at = _token(text, at)
    if token in "(),":
        raise ParseError(f"expression {text!r}: expected a name or a number at column {at - 1}, got {token!r}")
    if token[0] in "-0123456789" or token in ("inf", "nan"):
        return _number(text, token, at), at
    if not text[at:].lstrip().startswith("("):
        return Var(token), at
    _, at = _token(text, at)
    args: list[Expr] = []
    while True:
        arg, at = _parse_at(text, at)
        args.append(arg)
        sep, at = _token(text, at)
        if sep == ")":
            return call(token, *args), at
        if sep != ",":
            raise ParseError(f"expression {text!r}: expected ',' or ')' at column {at - 1}, got {sep!r}")
