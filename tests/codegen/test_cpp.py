"""The emitted translation unit: golden text, the activation as C++, errors that name the field."""

from dataclasses import replace
from pathlib import Path

import pytest

from moec.codegen import EMITTERS, cpp
from moec.errors import CodegenError
from moec.ir.expr import parse
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.runtime.cpu import kernel_source
from moec.target import Target

GOLDEN = Path(__file__).parents[1] / "golden" / "swiglu_bf16_avx2.cpp"
SPEC = KernelSpec(
    ExpertsSpec("bf16"), RouterSpec("bf16", renormalize=True, weight_dtype="bf16"), y_dtype="bf16"
)  # fmt: skip
AVX2 = Target("avx2", 8, 6, 2, 3, False, ("-mavx2",))


def test_golden():
    """After a wanted change: write the new text to the file and read the difference."""
    assert cpp.emit(SPEC, AVX2, "bf16") == GOLDEN.read_text()


def test_a_unit_is_short():
    assert len(cpp.emit(SPEC, AVX2, "bf16").splitlines()) < 60
    assert len(cpp.emit(replace(SPEC, router=None), AVX2).splitlines()) < 40


def test_expression_text():
    text = cpp.expression(parse("mul(silu(clamp_max(a, 7.0)), add(b, 1.0))"))
    assert text == "mul(silu(clamp_max(a, splat(7.0f))), add(b, splat(1.0f)))"
    assert cpp.expression(parse("maximum(a, -inf)")) == "maximum(a, splat(-__builtin_inff()))"


def test_what_occurs_twice_is_computed_once():
    spec = KernelSpec(ExpertsSpec(gate="none", activation="mul(relu(a), relu(a))"))
    text = cpp.emit(spec, AVX2)
    assert text.count("relu(a)") == 3  # twice in the comment that names the spec
    assert "const vf t0 = relu(a);" in text
    assert "return mul(t0, t0);" in text


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (KernelSpec(ExpertsSpec(gate="half")), "gate='half'"),
        (KernelSpec(ExpertsSpec(layout_in="kk")), "layout_in='kk'"),
        (KernelSpec(ExpertsSpec(gate="none")), "reads b"),
        (KernelSpec(ExpertsSpec(activation="mul(a, c)")), "reads c"),
        (KernelSpec(ExpertsSpec(), RouterSpec(score="tanh")), "score='tanh'"),
        (KernelSpec(ExpertsSpec(), RouterSpec(score="mul(softmax, logits)")), "score='mul"),
        (KernelSpec(ExpertsSpec(), RouterSpec(softmax_of="1.0")), "softmax_of='1.0'"),
    ],
)
def test_unknown_values_are_named(spec, words):
    with pytest.raises(CodegenError, match=words):
        cpp.emit(spec, AVX2)


def test_source_for_people_has_headers_and_unit():
    text = kernel_source(str(SPEC))
    for name in cpp.HEADERS:
        assert f"// ===== {name}" in text
    assert str(SPEC) in text
    assert tuple(EMITTERS) == ("cpp",)
