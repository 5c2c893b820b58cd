"""Sites as text: exact spelling, round trips over random sites, types that follow from the rest, errors."""

import math
from dataclasses import fields, is_dataclass, replace

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import ParseError
from moec.ir import site as ir
from moec.ir.dims import symbol
from moec.ir.field_text import KINDS
from moec.ir.graph import Type
from moec.ir.site_parse import parse_site
from moec.ir.site_text import dump_site, names_text, run

QUICK = settings(max_examples=80, deadline=None, derandomize=True)
T = symbol("T")
I = sympy.Integer

EXAMPLE = """\
moe @model.layers.0.mlp (%x: bf16[T, 2048]) -> (%y: bf16[T, 2048]) E=64 form=grouped {    # model.py:279
  %s       = score softmax(linear(%x, weight) in bf16) as f32 : f32[T, 64]                 row_local
    weight = %gate_weight
  %e, %p   = select topk(%s, k=8, per=token)                  : i64[T, 8], f32[T, 8]       nnz=8*T
  %w       = weight renormalize(score[%e]) as bf16            : bf16[T, 8]
  %r, %off = dispatch ragged(%x, %e, by=token)                : bf16[8*T, 2048], i64[65]   rows=8*T
  %h       = body gated mul(silu(a), b) of %r in bf16         : bf16[8*T, 2048]            F=768 gate=concat
    ab     = %gate_up_proj                                    : bf16[64, 1536, 2048]
    out    = %down_proj                                       : bf16[64, 2048, 768]
  %y       = combine weighted_sum(%h, %w) in f32 as bf16
  aux histogram(%off)
}
"""

SITE = ir.Site(
    name="model.layers.0.mlp",
    x="x",
    y="y",
    x_type=Type("bf16", (T, I(2048))),
    y_type=Type("bf16", (T, I(2048))),
    num_experts=I(64),
    score=ir.Score("softmax", "gate_weight", compute="bf16"),
    select=ir.Select("topk", I(8), 8 * T),
    weight=ir.Weight("score", renormalize=True, dtype="bf16"),
    dispatch=ir.Dispatch(8 * T),
    body=ir.Body(
        "gated",
        "mul(silu(a), b)",
        I(768),
        "concat",
        params=(("ab", ("gate_up_proj",)), ("out", ("down_proj",))),
        dtype="bf16",
    ),
    combine=ir.Combine(dtype="bf16"),
    aux=(ir.Aux("histogram", "off"),),
    form="grouped",
    loc="model.py:279",
)

SEPARATE = tuple((role, tuple(f"experts_{i}_{role}_weight" for i in range(64))) for role in ("a", "b", "out"))


def test_the_example():
    assert dump_site(SITE) == EXAMPLE
    assert parse_site(EXAMPLE) == SITE


def test_types_may_be_left_out_and_spacing_is_free():
    lines = (line.partition(" : ")[0] + ("" if "nnz" not in line else " nnz=8*T") for line in EXAMPLE.split("\n"))
    bare = "\n".join(" ".join(line.split()) for line in lines)
    bare = bare.replace("by=token)", "by=token) rows=8*T").replace("%r in bf16", "%r in bf16 gate=concat F=768")
    header = EXAMPLE.partition("\n")[0]
    assert parse_site("\n".join([header, *bare.split("\n")[1:]])) == SITE


def test_every_part_that_a_site_may_have():
    site = replace(
        SITE,
        score=ir.Score("sigmoid", "", "b", row_local=False, mutates=("counts",)),
        select=ir.Select("topk", I(8), 8 * T, "token", "correction", 8, 4, "max", 0.0, False),
        weight=ir.Weight("choice", True, True, 1e-20, 1e-9, 2.5),
        capacity=ir.Capacity(T // 4, "score", "passthrough"),
        dispatch=ir.Dispatch(8 * T + 64, "sequence", 16),
        body=replace(
            SITE.body,
            gate="separate",
            params=SEPARATE,
            layout_in="kn",
            layout_out="kn",
            transform=ir.ParamTransform("lora", ("lora_a", "lora_b")),
        ),
        combine=ir.Combine("input", "bf16", "f16", ("residual", "axpy")),
        shared=ir.SharedExpert("mul(silu(a), b)", I(1408), True),
        states=(ir.State("momentum", "0.9 * m + y", "step"), ir.State("n", "")),
        aux=(ir.Aux("histogram", "off"), ir.Aux("loss", "l.1")),
        guards=(ir.Guard("T <= 512"), ir.Guard('"quoted"')),
        plan=ir.Plan("cuda", "triton", False, True),
    )
    text = dump_site(site)
    assert parse_site(text) == site
    for shown in (
        "score sigmoid(linear(%x, bias) in f32) as f32",
        "    bias   = %b\n",
        "row_local=False mutates=[counts]",
        "select topk(%s + bias, k=8, per=token)",
        "    bias   = %correction\n",
        "groups=8 topk_group=4 group_score=max masked_value=0.0 sorted=False",
        "weight renormalize(softmax(choice[%e])) as f32",
        "eps=1e-20 clamp_min=1e-09 scale=2.5",
        "capacity limit=floor(T/4) order=score drop=passthrough",
        "by=sequence)",
        "rows=(8*T + 64) padding=16",
        "gate=separate layout_in=kn layout_out=kn",
        "out    = [%experts_0_out_weight .. %experts_63_out_weight]",
        "transform lora(%lora_a, %lora_b)",
        "combine weighted_sum(%h, %w) in bf16 as f16   weight_on=input epilogue=[residual, axpy]",
        "shared mul(silu(a), b)   F=1408 gated",
        'state %momentum "0.9 * m + y"   scope=step',
        "aux loss(%l.1)",
        'guard "T <= 512"',
        "plan device=cuda engine=triton fuse_router=False training",
    ):
        assert shown in text, shown


def test_parameters_show_the_layout_that_kernels_see():
    kn = replace(SITE, body=replace(SITE.body, layout_in="kn", layout_out="kn"))
    assert "%gate_up_proj" in dump_site(kn)
    assert "bf16[64, 2048, 1536]" in dump_site(kn)
    assert "bf16[64, 768, 2048]" in dump_site(kn)
    separate = dump_site(replace(SITE, body=replace(SITE.body, gate="separate", params=SEPARATE)))
    assert ": bf16[768, 2048]" in separate
    assert ": bf16[2048, 768]" in separate


def test_an_expert_choice_site_has_one_pair_an_entry():
    select = ir.Select("expert_choice", I(32), I(2048), budget="expert")
    site = replace(SITE, select=select, dispatch=ir.Dispatch(I(2048)))
    assert "i64[2048], f32[2048]" in dump_site(site)
    assert parse_site(dump_site(site)) == site


@pytest.mark.parametrize(
    ("first", "last", "count"),
    [("e_0_w", "e_7_w", 8), ("l3.e9", "l3.e11", 3), ("e_0_w", "f_7_w", 0), ("e_07", "e_09", 0), ("e_0_1", "e_1_2", 0)],
)
def test_runs_of_names(first, last, count):
    names = run(first, last) or ()
    assert len(names) == count
    assert not names or (names[0], names[-1]) == (first, last)


def test_a_long_name_leaves_the_columns_where_they_are():
    text = dump_site(replace(SITE, y="the_hidden_states_after_all_the_experts", x="x"))
    assert "\n  %s       = score" in text
    assert "\n  %the_hidden_states_after_all_the_experts = combine" in text


def test_names_that_are_no_run_are_all_listed():
    assert names_text(("a",)) == "%a"
    assert names_text(("w0", "w1")) == "[%w0, %w1]"
    assert names_text(("w0", "w1", "w2")) == "[%w0 .. %w2]"
    assert names_text(("w0", "w2", "w1")) == "[%w0, %w2, %w1]"
    assert names_text(()) == "[]"


def test_a_field_added_to_the_ir_has_a_spelling():
    spelled = {"Type", "ParamTransform", "tuple[tuple[str, tuple[str, ...]], ...]"}
    words = [c for c in vars(ir).values() if is_dataclass(c) and c.__module__ == ir.__name__ and c is not ir.Site]
    assert len(words) == 13
    for word in words:
        assert {str(f.type) for f in fields(word)} <= {*KINDS, *spelled}, word


WORDS = st.sampled_from(
    ["softmax", "linear", "score", "select", "as", "in", "True", "inf", "", "a b", 'q"', "f32", "plan"]
)
NAMES = st.sampled_from(["x", "topk.r0", "w_3", "L['w']", "", "%", "e", "7"])
DIMS = st.sampled_from([I(0), I(8), T, 8 * T + 1, T // 2, -T, T * symbol("E")])
FLOATS = st.sampled_from([0.0, 1.0, -1.5, 1e-20, math.inf, -math.inf])
SMALL = st.integers(-2, 100)
FLAGS = st.booleans()
ACTIVATIONS = st.sampled_from(["mul(silu(a), b)", "a", "", "relu( a)", "-1.0", "clamp_max(a, 1e-05)", "not an (", '"'])
TYPES = st.builds(Type, st.sampled_from(["f32", "any"]), st.lists(DIMS, max_size=3).map(tuple))
TUPLES = st.lists(WORDS, max_size=2).map(tuple)


def names(most):
    return st.lists(NAMES, max_size=most).map(tuple)


PARAMS = st.lists(st.tuples(WORDS, names(3)), max_size=3).map(tuple) | st.just(SEPARATE)
TRANSFORMS = st.builds(ir.ParamTransform, WORDS, names(2)) | st.just(ir.ParamTransform())
BODIES = st.builds(ir.Body, WORDS, ACTIVATIONS, DIMS, WORDS, WORDS, WORDS, PARAMS, WORDS, TRANSFORMS) | st.just(
    SITE.body
)
SITES = st.builds(
    ir.Site,
    name=WORDS,
    x=NAMES,
    y=NAMES,
    x_type=TYPES,
    y_type=TYPES,
    num_experts=DIMS,
    score=st.builds(ir.Score, WORDS, NAMES, NAMES, WORDS, WORDS, FLAGS, TUPLES),
    select=st.builds(ir.Select, WORDS, DIMS, DIMS, WORDS, NAMES, SMALL, SMALL, WORDS, FLOATS, FLAGS),
    weight=st.builds(ir.Weight, WORDS, FLAGS, FLAGS, FLOATS, FLOATS, FLOATS, WORDS),
    dispatch=st.builds(ir.Dispatch, DIMS, WORDS, SMALL),
    body=BODIES,
    combine=st.builds(ir.Combine, WORDS, WORDS, WORDS, TUPLES),
    capacity=st.none() | st.builds(ir.Capacity, DIMS, WORDS, WORDS),
    shared=st.none() | st.builds(ir.SharedExpert, ACTIVATIONS, DIMS, FLAGS),
    states=st.lists(st.builds(ir.State, NAMES, st.text(max_size=4), WORDS), max_size=2).map(tuple),
    aux=st.lists(st.builds(ir.Aux, WORDS, NAMES), max_size=2).map(tuple),
    guards=st.lists(st.builds(ir.Guard, st.text(max_size=6)), max_size=2).map(tuple),
    plan=st.builds(ir.Plan, WORDS, WORDS, FLAGS, FLAGS) | st.just(ir.Plan()),
    form=WORDS,
    loc=WORDS,
)


@QUICK
@given(SITES)
def test_random_sites_read_back(site):
    text = dump_site(site)
    assert parse_site(text) == site
    assert dump_site(parse_site(text)) == text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("i64[T, 8], f32[T, 8]", "i64[T, 9], f32[T, 8]", "line 4, .*expected i64.T, 8., f32.T, 8., which follows"),
        ("bf16[64, 1536, 2048]", "bf16[64, 768, 2048]", "line 8, .*expected bf16.64, 1536, 2048., which follows"),
        ("nnz=8*T", "", "line 4, .*expected nnz="),
        ("F=768 ", "", "line 7, .*expected F="),
        ("   rows=8*T", "", "line 6, .*expected rows="),
        ("F=768", "F=768 F=769", "expected 'F' once"),
        ("gate=concat", "gates=concat", r"expected a field of Body \(kind, activation, F, gate,.*found 'gates'"),
        ("row_local", "row_local=maybe", "expected True or False, found 'maybe'"),
        ("mul(silu(a), b)", "mul(silu(a))", "an activation .*takes 2 arguments, got 1"),
        ("mul(silu(a), b)", "mul(silu(a), b", r"expected '\)'|an activation"),
        ("score softmax", "scores softmax", "expected one of score, select, weight"),
        ("  %s  ", "  %t  ", "expected %s left of 'score', found %t"),
        ("aux histogram(%off)", "aux histogram", r"expected '\('"),
        ("aux histogram(%off)", "auxiliary(%off)", "expected '%name = word …', an operand"),
        ("%gate_up_proj", "[%a_1 .. %b_4]", "two names that differ in one rising number"),
        (" E=64", "", "expected a site with E="),
        ("@model.layers.0.mlp", "model", "expected a name such as @model.layers.0.mlp"),
        (
            "    weight = %gate_weight\n",
            "",
            "line 3, column 3: expected the line 'weight = %name' of 'score', found '%e'",
        ),
        ("weight = %gate", "bias = %gate", "expected 'weight', found 'bias'"),
        ("linear(%x, weight)", "linear(%x)", "line 3, .*expected no operand: all that 'score' uses is there"),
        ("  aux", "    x = %a\n  aux", "expected no operand: all that 'combine' uses is there"),
        ("of %r", "of %q", "expected '%r', found '%q'"),
        ("aux histogram(%off)\n", "", None),
        ("}\n", "}\nmore", "expected the end of the text"),
    ],
)
def test_errors_say_where_and_what(old, new, message):
    assert old in EXAMPLE
    text = EXAMPLE.replace(old, new, 1)
    if message is None:
        assert parse_site(text) == replace(SITE, aux=())
        return
    with pytest.raises(ParseError, match=message):
        parse_site(text)


@pytest.mark.parametrize("word", ["score", "select", "weight", "dispatch", "body", "combine"])
def test_each_word_of_the_flow_is_needed_once(word):
    line = next(line for line in EXAMPLE.split("\n") if f"= {word} " in line)
    without = "\n".join(each for each in EXAMPLE.split("\n") if each != line)
    operands = {"score": "'%s = score …' first", "body": "no operand: all that 'dispatch' uses is there"}
    with pytest.raises(ParseError, match=operands.get(word, f"a site with {word}, found none")):
        parse_site(without)
    again = EXAMPLE.replace("  aux histogram(%off)\n", f"{line}\n")
    with pytest.raises(ParseError, match=f"expected one '{word}' a site"):
        parse_site(again)
