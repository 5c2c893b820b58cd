"""What stands beside rows: a vector of their expert or a number a row, and nothing where rows' features are split."""

from __future__ import annotations

import sympy

from moec.ir.graph import Graph, Type
from moec.passes.cells.beside import beside
from moec.passes.cells.rows import Axes, Links, View
from moec.passes.rows.lift import Lifter
from moec.passes.rows.rows import Slot

T, G, F = sympy.Integer(13), sympy.Integer(4), sympy.Integer(8)


def held(value: Axes, rows: Axes, *shape: sympy.Integer):
    """What the value `v` of this shape is beside rows on these axes."""
    lifter = Lifter(Graph((("v", Type("f32", shape)),), (), ("v",)), {})
    return beside(lifter, View("v", value), value, rows, Links({}), {})


def test_a_number_a_row():
    assert held(((("0", T),), ()), ((("a", T),), (("f", F),)), T) == (Slot("v"), ((("a", T),), (("f", F),)))


def test_rows_whose_features_are_split_and_joined_again_have_nothing_beside_them():
    streams = ((("a", T),), (("f", G), ("f", F)))
    assert held(((("0", T),), (("1", G), ("2", F))), streams, T, G, F) is None
    assert held(((("0", T),), ()), streams, T) is None
