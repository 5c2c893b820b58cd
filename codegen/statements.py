"""Expressions as statements of a target language: subexpressions that occur twice are named and computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from moec.ir.expr import Call, Expr


def statements(
    exprs: Mapping[str, Expr], leaf: Callable[[Expr], str], call: Callable[[str, Sequence[str]], str]
) -> tuple[tuple[str, str], ...]:
    """(name, value) of each expression under its own name, after the t0, t1, … that it shares with others or itself.

    `leaf` writes variables and constants, `call` a function's name with the texts of its arguments.
    """
    counts: dict[Expr, int] = {}

    def count(e: Expr) -> None:
        counts[e] = counts.get(e, 0) + 1
        if isinstance(e, Call) and counts[e] == 1:
            for arg in e.args:
                count(arg)

    for expr in exprs.values():
        count(expr)
    names: dict[Expr, str] = {}
    lines: list[tuple[str, str]] = []

    def text(e: Expr) -> str:
        if not isinstance(e, Call):
            return leaf(e)
        if e not in names:
            body = call(e.fn, [text(arg) for arg in e.args])
            if counts[e] == 1:
                return body
            names[e] = f"t{len(names)}"
            lines.append((names[e], body))
        return names[e]

    for name, expr in exprs.items():
        lines.append((name, text(expr)))
    return tuple(lines)
