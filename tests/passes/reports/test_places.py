"""A value's line in the user's code: its own, or the nearest one around it."""

from __future__ import annotations

import pytest

from moec.ir.graph import Graph, Instr, Ref, Type
from moec.passes.reports.places import place

KIND = Type("f32", ())


def chain(*locs: str) -> Graph:
    """x → %v0 → %v1 → …, each with its line; %side is made from %v0 and has none."""
    instrs = [
        Instr((f"v{i}",), "relu", (Ref(f"v{i - 1}" if i else "x"),), (KIND,), (), loc) for i, loc in enumerate(locs)
    ]
    instrs.append(Instr(("side",), "relu", (Ref("v0"),), (KIND,), (), ""))
    return Graph((("x", KIND), ("lonely", KIND)), tuple(instrs), ("side",))


@pytest.mark.parametrize(
    ("locs", "values", "expected"),
    [
        (("a:1", "a:2"), ("v1",), "a:2"),  # its own line
        (("a:1", "", ""), ("v2",), "a:1"),  # else the nearest that it is made from
        (("", "", "a:3"), ("v0",), "a:3"),  # else the nearest that is made from it
        (("", "a:2", "a:3"), ("x",), "a:2"),  # an input has no line: its first reader has
        (("a:1", ""), ("side", "v1"), "a:1"),
        (("a:1", "", "a:3"), ("v1", "v2"), "a:3"),  # the own line of any value goes before its neighbours'
        (("a:1",), ("lonely", "v0"), "a:1"),
        (("a:1",), ("lonely",), ""),
        (("", ""), ("v0",), ""),
        (("a:1",), ("no such value",), ""),
    ],
)
def test_the_nearest_line_stands_for_a_value(locs, values, expected):
    assert place(chain(*locs), *values) == expected
