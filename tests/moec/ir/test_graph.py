"""The graph: lookups, sweep, substitution, types as text."""

import dataclasses

import pytest
import sympy

from moec.ir.dims import symbol
from moec.ir.graph import Graph, Instr, Ref, Type, normal_dim, substitute, sweep
from moec.ir.text import dump, parse

TEXT = """\
graph(%x: f32[T, 8], %m: f32[T]) {
  %a = neg(%x) : f32[T, 8]
  %v, %i = topk(%a) k=2 dim=1 : f32[T, 2], i64[T, 2]
  %c = cat([%v, %v, [%x]], 1) : f32[T, 4]
  return %c, %m
}
"""
GRAPH = parse(TEXT)


def body(*lines, outputs="%y"):
    inside = "\n".join(f"  {line}" for line in lines)
    return parse(f"graph(%x: f32[T], %z: f32[T]) {{\n{inside}\n  return {outputs}\n}}")


def words(graph):
    return [instr.word for instr in graph.instrs]


def test_lookups():
    a, topk, cat = GRAPH.instrs
    assert GRAPH.defs == {"a": a, "v": topk, "i": topk, "c": cat}
    assert GRAPH.position == {"x": -1, "m": -1, "a": 0, "v": 1, "i": 1, "c": 2}
    assert GRAPH.users == {"x": (a, cat), "a": (topk,), "v": (cat,)}
    assert GRAPH.types["i"] == Type("i64", (symbol("T"), sympy.Integer(2)))
    assert list(GRAPH.types) == ["x", "m", "a", "v", "i", "c"]
    assert cat.uses == ("v", "v", "x")


def test_behind_stops_at_other_words_inputs_and_literals():
    graph = body("%a = neg(%x) : f32[T]", "%b = cast(%a) : f64[T]", "%y = cast(%b) : f32[T]")
    assert graph.behind(Ref("y"), ("cast",)) == Ref("a")
    assert graph.behind(Ref("y"), ("cast", "neg")) == Ref("x")
    assert graph.behind(Ref("y"), ()) == Ref("y")
    assert graph.behind(3, ("cast",)) == 3


def test_attributes():
    assert GRAPH.instrs[1].attr("k") == 2
    with pytest.raises(KeyError, match="topk has no attribute 'largest'"):
        GRAPH.instrs[1].attr("largest")


def test_graphs_are_values():
    assert parse(TEXT) == GRAPH
    assert hash(parse(TEXT)) == hash(GRAPH)
    assert GRAPH.with_instrs(GRAPH.instrs[:1]) != GRAPH
    assert GRAPH.with_instrs(iter(GRAPH.instrs)) == GRAPH
    with pytest.raises(dataclasses.FrozenInstanceError):
        GRAPH.instrs[0].word = "exp"


def test_types_as_text():
    assert str(Type("any")) == "any"
    assert str(Type("f32")) == "f32[]"
    assert str(Type("bf16", (8 * symbol("T"), sympy.Integer(64)))) == "bf16[8*T, 64]"
    assert Type("f32", (symbol("T"),)).rank == 1
    assert str(Ref("x")) == "%x"


def test_normal_dim_is_here_too():
    assert normal_dim(sympy.Symbol("s0", positive=True, integer=True)) == symbol("s0")


def test_sweep_drops_what_nothing_needs():
    graph = body("%d = neg(%x) : f32[T]", "%dd = exp(%d) : f32[T]", "%y = exp(%x) : f32[T]")
    assert words(sweep(graph)) == ["exp"]
    assert sweep(sweep(graph)) == sweep(graph)


def test_sweep_keeps_an_instruction_for_any_of_its_results():
    graph = body("%v, %y = topk(%x) k=1 dim=0 : f32[1], i64[1]")
    assert sweep(graph) == graph


def test_sweep_keeps_effects_and_what_they_need():
    graph = body(
        '%e = effect(%x) target="_set_grad_enabled" : any',
        "%p = neg(%z) : f32[T]",
        "%r = random(%p) : f32[T]",
        "effect()",
        "%y = exp(%x) : f32[T]",
    )
    assert sweep(graph) == graph


def test_an_assert_lives_as_long_as_what_it_looks_at():
    kept = body("%y = neg(%x) : f32[T]", "assert(%y)", "assert(%x)")
    assert sweep(kept) == kept
    graph = body("%c = neg(%x) : f32[T]", "assert(%c)", "%a = assert(%c) : any", "%y = exp(%x) : f32[T]")
    assert words(sweep(graph)) == ["exp"]


def test_an_assert_does_not_keep_another_alive():
    graph = body("%t = assert(%x) : any", "assert(%t)", "%y = exp(%x) : f32[T]")
    assert words(sweep(graph)) == ["assert", "exp"]


def test_sweep_of_nothing():
    empty = Graph((), (), ())
    assert sweep(empty) == empty


def test_substitute_renames_uses_and_nothing_else():
    renamed = GRAPH.with_instrs(substitute(GRAPH.instrs, {"v": "x", "x": "m", "c": "q"}))
    assert [i.uses for i in renamed.instrs] == [("m",), ("a",), ("x", "x", "m")]
    assert [i.results for i in renamed.instrs] == [i.results for i in GRAPH.instrs]
    assert "cat([%x, %x, [%m]], 1)" in dump(renamed)


def test_substitute_leaves_untouched_instructions_the_same_objects():
    after = list(substitute(GRAPH.instrs, {"v": "x"}))
    assert after[0] is GRAPH.instrs[0]
    assert after[1] is GRAPH.instrs[1]
    assert after[2] is not GRAPH.instrs[2]


def test_literals_are_no_uses():
    assert Instr(("y",), "add", (Ref("x"), "x", 1, None, ("x", (Ref("z"),))), (Type("any"),)).uses == ("x", "z")
