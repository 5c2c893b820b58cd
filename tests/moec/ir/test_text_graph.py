"""Graphs as text: exact spelling, round trips over random graphs, errors, diffs."""

import math

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import ParseError
from moec.ir.dims import symbol
from moec.ir.graph import Graph, Instr, Ref, Type
from moec.ir.text import diff, dump, instr_text, parse

QUICK = settings(max_examples=60, deadline=None, derandomize=True)

EXAMPLE = """\
graph(%x: f32[T, 2048], %w: f32[64, 2048]) {
  %s = contract(%x, %w) eq="ab,cb->ac" : f32[T, 64]    # model.py:11
  %a, %b = topk(%s) k=2 dim=1 sorted=True : f32[T, 2], i64[T, 2]    # model.py:12
  %c = cat([%a, %a], -1) : f32[T, 4]
  effect(0.5, None) target="_set_grad_enabled"
  %n = opaque(%x) : any
  return %c, %b
}
"""


def test_example_prints_as_it_parses():
    graph = parse(EXAMPLE)
    assert dump(graph) == EXAMPLE
    T = symbol("T")
    assert graph.inputs[0] == ("x", Type("f32", (T, sympy.Integer(2048))))
    assert graph.instrs[1].results == ("a", "b")
    assert graph.instrs[1].attrs == (("k", 2), ("dim", 1), ("sorted", True))
    assert graph.instrs[1].loc == "model.py:12"
    assert graph.instrs[2].args == ((Ref("a"), Ref("a")), -1)
    assert graph.instrs[3].types == ()
    assert graph.instrs[4].types == (Type("any"),)
    assert graph.outputs == ("c", "b")


def test_spacing_blank_lines_and_comments_do_not_matter():
    text = (
        "# a graph\n\n  graph ( %x : f32[] ,\n %y:any ) {   \n # nothing yet\n\n%z=neg(%x):f32[]\n\n return %z\n}\n\n"
    )
    graph = parse(text)
    assert [name for name, _ in graph.inputs] == ["x", "y"]
    assert graph.instrs == (Instr(("z",), "neg", (Ref("x"),), (Type("f32"),)),)


def test_empty_graph():
    assert dump(Graph((), (), ())) == "graph() {\n  return\n}\n"
    assert parse("graph() {\n  return\n}\n") == Graph((), (), ())


def test_many_inputs_stand_one_a_line():
    inputs = tuple((f"parameter_{i}", Type("bf16", (symbol("T"), sympy.Integer(i)))) for i in range(8))
    graph = Graph(inputs, (), ("parameter_0",))
    assert "\n  %parameter_3: bf16[T, 3],\n" in dump(graph)
    assert parse(dump(graph)) == graph


@pytest.mark.parametrize(
    "value", [0, -1, 10**20, 0.5, -2.5e-30, 1e300, math.inf, -math.inf, math.nan, True, False, None]
)
def test_literals_keep_their_kind(value):
    graph = Graph((), (Instr((), "effect", (value,), (), (("value", value),)),), ())
    back = parse(dump(graph))
    assert back == graph
    assert type(back.instrs[0].args[0]) is type(value)
    assert type(back.instrs[0].attrs[0][1]) is type(value)


@pytest.mark.parametrize("text", ["", 'a"b', "a\\b", "a\nb", "# no", "%x", "\u2028", "é", "]", "inf", " pad ", "\t"])
def test_any_string_is_an_attribute_a_loc_and_a_name(text):
    instr = Instr((f"r{text}",), f"w{text}", (text,), (Type("any"),), ((f"n{text}", text),), text)
    graph = Graph(((text, Type("f32")),), (instr,), (f"r{text}",))
    assert parse(dump(graph)) == graph
    assert dump(graph).count("\n") == 4


@pytest.mark.parametrize("word", ["return", "graph", "inf", "True", "a.b", "aten::view", "0x"])
def test_words_that_mean_something_else_here(word):
    graph = Graph((), (Instr((), word, (), (), ((word, 1),)), Instr((word,), word, (), (Type("any"),))), (word,))
    assert parse(dump(graph)) == graph


SYMBOLS = st.sampled_from(["s0", "s1", "T", "u0"]).map(symbol)
DIMS = st.one_of(
    st.integers(0, 4096).map(sympy.Integer),
    SYMBOLS,
    st.tuples(st.integers(1, 9), SYMBOLS, SYMBOLS).map(lambda p: p[0] * p[1] * p[2] + p[0]),
)
TYPES = st.one_of(
    st.just(Type("any")),
    st.builds(Type, st.sampled_from(["f32", "bf16", "i64", "bool", "f8e4m3fn"]), st.lists(DIMS, max_size=3).map(tuple)),
)
NAMES = st.sampled_from(["x", "topk.r0", "view_3", "x.1.r0", "L['a']", "return", "0", ""]) | st.text(max_size=3)
LITERALS = st.one_of(
    st.integers(), st.floats(allow_nan=False), st.booleans(), st.none(), st.text(max_size=8), st.just(math.nan)
)
ATTRS = st.recursive(LITERALS, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5)
ARGS = st.recursive(LITERALS | NAMES.map(Ref), lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5)
INSTRS = st.builds(
    Instr,
    st.lists(NAMES, max_size=2).map(tuple),
    NAMES,
    st.lists(ARGS, max_size=3).map(tuple),
    st.lists(TYPES, max_size=2).map(tuple),
    st.lists(st.tuples(NAMES, ATTRS), max_size=2).map(tuple),
    st.sampled_from(["", "/a b/model.py:12"]) | st.text(max_size=5),
)
GRAPHS = st.builds(
    Graph,
    st.lists(st.tuples(NAMES, TYPES), max_size=4).map(tuple),
    st.lists(INSTRS, max_size=3).map(tuple),
    st.lists(NAMES, max_size=2).map(tuple),
)


@QUICK
@given(GRAPHS)
def test_random_graphs_read_back(graph):
    text = dump(graph)
    assert parse(text) == graph
    assert dump(parse(text)) == text
    assert all("\n" not in instr_text(instr) for instr in graph.instrs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, column 1: expected 'graph', found the end of the text"),
        ("graph(%x) {", "line 1, column 9: expected ':', found"),
        ("graph(%x: f32) {", "line 1, column 14: expected '\\[' and the sizes"),
        ("graph(%x: f32[2] %y: f32[2]) {", "expected ',' or '\\)', found '%y'"),
        ("graph() {\n  %a = neg(%x : f32[2]\n  return\n}", "line 2, column 15: expected ',' or '\\)', found ':'"),
        ("graph() {\n  %a = (%x)\n  return\n}", "line 2, column 8: expected an instruction"),
        ("graph() {\n  %a neg(%x)\n  return\n}", "line 2, column 6: expected '=', found 'neg'"),
        ("graph() {\n  %a = neg(%x) : f32[2] 3\n  return\n}", "line 2, column 25: expected an attribute"),
        ("graph() {\n  %a = neg(x)\n  return\n}", "line 2, column 12: expected a value: %name, a number"),
        ("graph() {\n  %a = neg(%)\n  return\n}", "expected a value such as %x"),
        ('graph() {\n  f() a="\\q"\n  return\n}', "expected a string with JSON's escapes"),
        ("graph() {\n  return %x,\n}", "line 2, column 13: expected a value such as %x, found the end of the line"),
        ("graph() {\n  return %x\n", "expected '}', found the end of the text"),
        ("graph() {\n  return\n}\nmore", "line 4, column 1: expected the end of the text after '}', found 'more'"),
        ("graph() {\n  f() a=$\n  return\n}", "line 2, column 9: expected a value"),
    ],
)
def test_errors_say_where_and_what(text, message):
    with pytest.raises(ParseError, match=message):
        parse(text)


def test_errors_show_the_line():
    with pytest.raises(ParseError) as error:
        parse("graph() {\n  %a = neg(%x : f32[2]\n  return\n}")
    assert str(error.value).split("\n")[1:] == ["    %a = neg(%x : f32[2]", "                ^"]


def test_diff_shows_what_changed_with_context():
    before = parse(EXAMPLE)
    after = before.with_instrs(i for i in before.instrs if i.word != "effect")
    shown = diff(before, after, "sweep", context=1)
    assert shown.split("\n") == [
        "--- before sweep",
        "+++ after sweep",
        "@@ -4,3 +4,2 @@",
        "   %c = cat([%a, %a], -1) : f32[T, 4]",
        '-  effect(0.5, None) target="_set_grad_enabled"',
        "   %n = opaque(%x) : any",
    ]
    assert diff(before, before, "nothing") == ""
