"""Pointwise expressions as Triton: what each function of `moec.ir.expr` is on float32 tensors.

Half precision never reaches arithmetic: Triton's interpreter computes on its bit patterns, and sums want fp32 anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moec.codegen.statements import statements
from moec.ir.expr import POINTWISE, Call, Const, Expr, Var

# Functions that Triton has, or that are an operator, by their text.
_INLINE = {
    "add": "({} + {})",
    "sub": "({} - {})",
    "mul": "({} * {})",
    "div": "({} / {})",
    "neg": "(-{})",
    "exp": "tl.exp({})",
    "log": "tl.log({})",
    "sqrt": "tl.sqrt_rn({})",
    "abs": "tl.abs({})",
    "erf": "tl.erf({})",
    "ge": "({} >= {}).to(tl.float32)",
    "gt": "({} > {}).to(tl.float32)",
    "round_bf16": "to_bf16({}).to(tl.float32)",
    "round_f16": "({}).to(tl.float16).to(tl.float32)",
}

# The rest: arguments, body. NaN passes through comparisons as torch passes it.
_FUNCTIONS = {
    "sigmoid": ("x", "return 1.0 / (1.0 + tl.exp(-x))"),
    "silu": ("x", "return x / (1.0 + tl.exp(-x))"),
    "log1p": (
        "x",
        "one = 1.0 + x  # Higham: what 1 + x lost is made up for by the factor\n"
        "return tl.where(one == 1.0, x, tl.log(one) * (x / tl.where(one == 1.0, 1.0, one - 1.0)))",
    ),
    "softplus": ("x", "return tl.where(x > 20.0, x, log1p(tl.exp(tl.where(x > 20.0, 20.0, x))))"),
    "tanh": (
        "x",
        "square = x * x  # near zero the difference loses digits: there a fit, exact to a tenth of rounding\n"
        "fit = 0.13331442 + square * (-0.053739715 + square * (0.020639087 - square * 0.0057049868))\n"
        "near = x + x * (square * (-0.33333282 + square * fit))\n"
        "e = tl.exp(-2.0 * tl.abs(x))\n"
        "far = 1.0 - 2.0 * e / (1.0 + e)\n"
        "return tl.where(square < 0.390625, near, tl.where(x < 0, -far, far))",
    ),
    "relu": ("x", "return tl.where(x <= 0, 0.0, x)"),
    "gelu": ("x", "return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))"),
    "gelu_tanh": ("x", "return 0.5 * x * (1.0 + tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x)))"),
    "clamp_min": ("x, low", "return tl.where(x < low, low, x)"),
    "clamp_max": ("x, high", "return tl.where(x > high, high, x)"),
    "maximum": ("x, y", "return tl.where((x > y) | (x != x), x, y)"),
    "minimum": ("x, y", "return tl.where((x < y) | (x != x), x, y)"),
}
_CALLS = {"softplus": ("log1p",), "gelu_tanh": ("tanh",)}


def number(value: float) -> str:
    """A float as Triton reads it."""
    if value != value or value in (float("inf"), float("-inf")):
        return f'float("{value}")'
    return repr(float(value))


def functions(names: Iterable[str]) -> str:
    """Triton definitions of the pointwise functions named and of those they call."""
    wanted: dict[str, None] = {}
    for name in names:
        wanted |= dict.fromkeys((*_CALLS.get(name, ()), name))
    return "\n\n".join(_definition(name) for name in wanted if name in _FUNCTIONS)


def _definition(name: str) -> str:
    arguments, body = _FUNCTIONS[name]
    lines = "\n".join(f"    {line}" for line in body.split("\n"))
    return f"@triton.jit\ndef {name}({arguments}):\n{lines}\n"


def function(name: str, arguments: Sequence[str], results: Mapping[str, Expr], doc: str) -> str:
    """A Triton function of float32 tensors that returns `results`, in their order."""
    lines = [f"    {into} = {value}" for into, value in statements(results, _leaf, _call)]
    body = "\n".join([*lines, f"    return {', '.join(results)}"])
    return f'@triton.jit\ndef {name}({", ".join(arguments)}):\n    """{doc}"""\n{body}\n'


def used(exprs: Iterable[Expr]) -> tuple[str, ...]:
    """The pointwise functions that occur in expressions, in the order of `POINTWISE`."""
    found: set[str] = set()

    def visit(e: Expr) -> None:
        if isinstance(e, Call):
            found.add(e.fn)
            for arg in e.args:
                visit(arg)

    for expr in exprs:
        visit(expr)
    return tuple(name for name in POINTWISE if name in found)


def _leaf(e: Expr) -> str:
    return e.name if isinstance(e, Var) else number(e.value) if isinstance(e, Const) else ""


def _call(fn: str, args: Sequence[str]) -> str:
    return _INLINE[fn].format(*args) if fn in _INLINE else f"{fn}({', '.join(args)})"
