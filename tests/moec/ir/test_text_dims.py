"""Sizes: normal form, text, and back."""

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy import functions as ts

from moec.errors import ParseError
from moec.ir.dims import FUNCTIONS, dim_text, normal_dim, read_dim, symbol
from moec.ir.lex import Reader

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
T, E = symbol("T"), symbol("E")
DYNAMIC = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 3)


def parse_dim(text):
    reader = Reader(text)
    dim = read_dim(reader)
    if reader.peek.kind != "end":
        reader.fail("the end")
    return dim


def combine(children):
    pairs = st.tuples(children, children)
    divisor = st.integers(2, 6) | st.sampled_from([T, E])
    return st.one_of(
        pairs.map(lambda p: p[0] + p[1]),
        pairs.map(lambda p: p[0] - p[1]),
        pairs.map(lambda p: p[0] * p[1]),
        st.tuples(children, st.integers(2, 3)).map(lambda p: p[0] ** p[1]),
        st.tuples(children, divisor).map(lambda p: ts.FloorDiv(p[0], p[1])),
        st.tuples(st.sampled_from([T, E]), divisor).map(lambda p: ts.Mod(p[0] + 1, p[1])),
        st.tuples(children, divisor).map(lambda p: ts.PythonMod(p[0], p[1])),
        st.tuples(children, st.integers(2, 6)).map(lambda p: ts.CeilDiv(p[0], sympy.Integer(p[1]))),
        pairs.map(lambda p: ts.Max(*p)),
        pairs.map(lambda p: ts.Min(*p)),
        children.map(lambda c: sympy.floor(c / 4)),
    )


LEAVES = st.sampled_from([T, E, symbol("s0"), symbol("u1")]) | st.integers(-3, 4096).map(sympy.Integer)
DIMS = st.recursive(LEAVES, combine, max_leaves=6)


@QUICK
@given(DIMS)
def test_text_reads_back(dim):
    dim = normal_dim(dim)
    assert parse_dim(dim_text(dim)) == dim
    assert normal_dim(dim) == dim


@pytest.mark.parametrize(
    ("dim", "text"),
    [
        (8 * T, "8*T"),
        (2 * T + 1, "2*T + 1"),
        (ts.FloorDiv(T + 1, 2), "(T + 1)//2"),
        (ts.FloorDiv(8 * T, E), "(8*T)//E"),
        (1 - ts.FloorDiv(T, 2), "1 - (T//2)"),
        (ts.Max(1, T), "Max(1, T)"),
        (ts.CleanDiv(T, 4), "CleanDiv(T, 4)"),
        (ts.Mod(T, 4), "Mod(T, 4)"),
        (T**2 / E, "T**2/E"),
        (sympy.floor(T / 2), "floor(T/2)"),
        (sympy.Integer(-3), "-3"),
        (symbol("a b"), '"a b"'),
        (symbol("Max") * (T + 1), "Max*(T + 1)"),
    ],
)
def test_spelling(dim, text):
    assert dim_text(dim) == text
    assert parse_dim(text) == dim


def test_symbols_of_other_assumptions_are_one_in_normal_form():
    positive = sympy.Symbol("s0", integer=True, positive=True)
    assert positive != symbol("s0")
    assert normal_dim(2 * positive + sympy.Symbol("s1")) == 2 * symbol("s0") + symbol("s1")
    assert normal_dim(7) == sympy.Integer(7)
    assert type(normal_dim(sympy.Max(T, E))) is ts.Max


def test_every_function_reads_back_by_its_name():
    arities = {"ModularIndexing": 3, "RoundToInt": 1, "TruncToInt": 1, "ToFloat": 1, "floor": 1}
    arities |= {"ceiling": 1, "Abs": 1, "sqrt": 1, "FloorToInt": 1, "CeilToInt": 1}
    for name, function in FUNCTIONS.items():
        dim = function(*(T, E, symbol("s0"))[: arities.get(name, 2)])
        assert parse_dim(dim_text(dim)) == dim, name


def test_sizes_that_torch_makes_read_back():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.randn(6, 10, 8), symbolic_context=DYNAMIC, source=ConstantSource("x"))
    with mode:
        rows = x.reshape(-1, x.shape[-1])
        half = rows[: (rows.shape[0] + 1) // 2]
        made = [rows, half, torch.cat([rows, half]), x[:, ::3], x[: x.shape[0] % 4 + 1], x[2:]]
    seen = [d.node.expr for t in made for d in t.shape if isinstance(d, torch.SymInt)]
    dims = {normal_dim(expr) for expr in seen}
    assert any("//" in dim_text(d) or "floor" in dim_text(d) or "Mod" in dim_text(d) for d in dims), dims
    assert len(dims) >= 5
    for dim in dims:
        assert parse_dim(dim_text(dim)) == dim


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a size"),
        ("8 *", "expected a size"),
        ("(T + 1", r"expected '\)'"),
        ("sin(T)", "expected one of the functions Max, Min"),
        ("FloorDiv(T)", "arguments that FloorDiv takes, found '?\\(T\\)"),
        ("Mod(-1, 2)", "arguments that Mod takes"),
        ("T//0", "a divisor other than 0"),
        ("T/(2 - 2)", "a divisor other than 0"),
        ("'T'", "expected a size"),
        ("T T", "expected the end, found 'T'"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ParseError, match=message):
        parse_dim(text)
