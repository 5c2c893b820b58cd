"""Assignments that bind several names at once, as source before and after."""

from __future__ import annotations

import ast
import textwrap

import pytest

from moec.capture.single import single


def said(body: str) -> str:
    (node,) = ast.parse("def f(x):\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ")).body
    assert isinstance(node, ast.FunctionDef)
    return "\n".join(ast.unparse(stmt) for stmt in single(node).body)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("outs, start = [], 0", "outs = []\nstart = 0"),
        ("a, b = f(x), g(x)", "a = f(x)\nb = g(x)"),
        ("outs: list[Tensor] = []", "outs = []"),
        ("for i in x:\n    a, b = i, 1", "for i in x:\n    a = i\n    b = 1"),
    ],
)
def test_one_name_a_statement(before, after):
    assert said(before) == after


@pytest.mark.parametrize(
    "left",
    [
        "(a, b) = (b, a)",
        "(start, end) = (end, end + start)",
        "(a, b) = f(x)",
        "(a, b) = (*x, 1)",
        "(a, *b) = (1, 2)",
        "(x[0], a) = (1, 2)",
        "a = b = []",
        "n: int",
        "x.y: int = 1",
    ],
)
def test_left_as_written(left):
    assert said(left) == ast.unparse(ast.parse(left))
