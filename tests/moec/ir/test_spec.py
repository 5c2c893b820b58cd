"""KernelSpec: one line of text and back, what it says of parameters, parse errors."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import ParseError
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec

QUICK = settings(max_examples=80, deadline=None, derandomize=True)
DTYPE = st.sampled_from(sorted(DTYPES))
VALUES = {
    bool: st.booleans(),
    int: st.integers(1, 64),
    float: st.sampled_from([0.0, 1.0, 1e-20, 2.5, -math.inf, math.inf, -1e9]),
}
CHOICES = {
    "gate": st.sampled_from(["none", "concat", "interleaved", "separate"]),
    "layout_in": st.sampled_from(["nk", "kn"]),
    "layout_out": st.sampled_from(["nk", "kn"]),
    "activation": st.sampled_from(["mul(silu(a), b)", "relu(a)", "mul(clamp_max(a, 7.0), add(b, 1.0))"]),
    "weight_on": st.sampled_from(["output", "input"]),
    "score": st.sampled_from(["softmax", "sigmoid", "softplus", "logits"]),
    "group_score": st.sampled_from(["top2_sum", "max"]),
    "weight_from": st.sampled_from(["score", "choice"]),
}


def specs(cls):
    def values(f):
        kind = type(f.default)
        if kind is str:
            return DTYPE if "dtype" in f.name or f.name == "compute" else CHOICES.get(f.name, st.just(f.default))
        return VALUES[kind]

    return st.builds(cls, **{f.name: values(f) for f in dataclasses.fields(cls)})


@QUICK
@given(st.builds(KernelSpec, specs(ExpertsSpec), st.none() | specs(RouterSpec), DTYPE))
def test_text_reads_back(spec):
    text = str(spec)
    assert KernelSpec.parse(text) == spec
    assert str(KernelSpec.parse(text)) == text
    assert "\n" not in text


def test_spelling_shows_what_differs_from_the_defaults():
    assert str(KernelSpec(ExpertsSpec())) == "experts{} -> f32"
    router = RouterSpec(compute="bf16", renormalize=True, eps=1e-20)
    spec = KernelSpec(ExpertsSpec(dtype="bf16", gate="none", activation="relu(a)"), router, "bf16")
    text = (
        "router{compute=bf16; renormalize=True; eps=1e-20} experts{dtype=bf16; gate=none; activation=relu(a)} -> bf16"
    )
    assert str(spec) == text
    assert KernelSpec.parse(text) == spec
    assert hash(KernelSpec.parse(text)) == hash(spec)
    assert KernelSpec.parse("router{} experts{} -> f16") == KernelSpec(ExpertsSpec(), RouterSpec(), "f16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected it to end in ' -> f32"),
        ("experts{}", "expected it to end in ' -> f32"),
        ("experts{} -> f64", "expected it to end in ' -> f32"),
        ("expert{} -> f32", "expected 'experts{…}'"),
        ("router{} -> f32", "expected 'router{…} experts{…}'"),
        ("router{ experts{} -> f32", "expected 'router{…} experts{…}'"),
        ("router{} expert{} -> f32", "expected 'experts{…}'"),
        ("experts{gates=none} -> f32", "ExpertsSpec: unknown field 'gates'; known: dtype, gate"),
        ("router{eps=tiny} experts{} -> f32", "RouterSpec: eps='tiny'; expected a value of type float"),
        ("router{groups=2.5} experts{} -> f32", "groups='2.5'; expected a value of type int"),
        ("experts{stacked=yes} -> f32", "stacked='yes'; expected a value of type bool"),
        ("experts{stacked} -> f32", "stacked=''; expected a value of type bool"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ParseError, match=message):
        KernelSpec.parse(text)


@pytest.mark.parametrize(
    ("spec", "groups", "views"),
    [
        (ExpertsSpec(), ("ab", "out"), 2),
        (ExpertsSpec(gate="none", activation="relu(a)"), ("ab", "out"), 1),
        (ExpertsSpec(bias_in=True, bias_out=True), ("ab", "out", "bias_ab", "bias_out"), 2),
        (ExpertsSpec(gate="separate", bias_in=True), ("a", "b", "out", "bias_a", "bias_b"), 2),
        (ExpertsSpec(gate="separate", bias_out=True, stacked=False), ("a", "b", "out", "bias_out"), 2),
    ],
)
def test_parameters_in_the_order_of_the_op(spec, groups, views):
    assert spec.param_groups == groups
    assert spec.ab_views == views


def test_activation_is_an_expression():
    assert str(ExpertsSpec().phi) == "mul(silu(a), b)"
    with pytest.raises(ParseError, match="unknown pointwise function 'sin'"):
        _ = ExpertsSpec(activation="sin(a)").phi
