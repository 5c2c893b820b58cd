"""Tunings are values: they print and parse back, refuse what kernels could not run, and candidates are few and fit."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.codegen.plan import Rows, Sizes, make_plan
from moec.codegen.tuning import Tuning, candidates, default_tuning, few_rows, row_block
from moec.errors import ParseError
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.target import Target

TARGET = Target("avx2", 8, 6, 2, 3, False, ())
NK = KernelSpec(ExpertsSpec(), RouterSpec())
KN = KernelSpec(ExpertsSpec("bf16", "interleaved", "kn", "kn"), None, "bf16")
A = {"H": 2048, "F": 768, "E": 64, "k": 8}
pairs = st.tuples(st.integers(1, 1000), st.integers(1, 1000))


def scaled(pair, by):
    return (pair[0] * by, pair[1] * by)


@given(pairs, pairs, pairs, pairs, st.integers(1, 10**6))
def test_text_goes_there_and_back(few, few_cols, many_cols, k_many, n):
    tuning = Tuning(few, scaled(few_cols, 16), scaled(many_cols, 16), n, 2 * n, scaled(k_many, 2), n)
    assert Tuning.parse(str(tuning)) == tuning


@pytest.mark.parametrize(
    "change",
    ["few=1", "few_cols=8,16", "many_cols=0,16", "k_few=3", "k_many=2,1", "chunk=0", "row_block=-1",
     "chunk=99999999999", "row_block=x", "row_block=", "more=1", "few_cols=16,16,16", "row_block=²"],
)  # fmt: skip
def test_what_no_kernel_could_run_is_refused(change):
    good = str(default_tuning(NK, Sizes(64, **A), TARGET, 2))
    name = change.partition("=")[0]
    items = [change if item.startswith(f"{name}=") else item for item in good.split()]
    with pytest.raises(ParseError):
        Tuning.parse(" ".join(items if name != "more" else [*items, change]))


@pytest.mark.parametrize("text", ["", "few", "few=1,1", "🎲", "few=1,1 " * 7])
def test_other_texts_are_refused(text):
    with pytest.raises(ParseError):
        Tuning.parse(text)


@pytest.mark.parametrize("T", [0, 1, 7, 64, 200, 4096])
@pytest.mark.parametrize("spec", [NK, KN])
def test_candidates_begin_with_the_default_and_are_distinct_and_few(T, spec):
    sizes = Sizes(T, **A)
    found = candidates(spec, sizes, TARGET, 2)
    assert found[0] == default_tuning(spec, sizes, TARGET, 2)
    assert 2 <= len(found) <= 32 or T == 0
    assert len(set(found)) == len(found)
    for tuning in found:
        plan = make_plan(spec, sizes, Rows(spec.experts.dtype, 2048, True), TARGET, 2, tuning)
        assert plan.tuning == tuning
        assert plan.workspace_bytes < 600 << 20


def test_candidates_do_not_differ_in_what_cannot_matter():
    one = candidates(NK, Sizes(1, **A), TARGET, 2)
    assert {(t.row_block, t.k_many) for t in one if t.few[0] > 0} == {(192, (256, 256))}
    many = candidates(NK, Sizes(4096, **A), TARGET, 2)
    assert len({(t.k_many, t.row_block, t.many_cols) for t in many}) > 8


def test_candidates_fit_the_caches():
    small = Target("avx2", 8, 6, 2, 3, False, (), l1_bytes=8 << 10, l2_bytes=64 << 10)
    for tuning in candidates(NK, Sizes(4096, **A), small, 2)[1:]:
        assert 4 * 16 * tuning.k_many[0] <= 8 << 10


def test_long_vectors_stream_weights_while_the_rows_stay_in_the_second_cache():
    target = Target("avx512_bf16", 16, 12, 2, 6, True, (), l2_bytes=1 << 20)
    assert few_rows("nk", ExpertsSpec("f32"), target) == few_rows("kn", ExpertsSpec("f32"), target) == 96
    assert few_rows("nk", ExpertsSpec("bf16"), target) == 192, "pairs of bf16 take half the room"
    assert few_rows("nk", ExpertsSpec("f16"), target) == few_rows("nk", ExpertsSpec("f32"), target), "f16 is widened"
    assert few_rows("nk", ExpertsSpec("f32"), TARGET) == 39, (
        "16 registers: packing pays from some rows on, whatever the cache"
    )
    assert few_rows("kn", ExpertsSpec("bf16"), TARGET) == 8


def test_long_vectors_take_more_rows_a_task_unless_tiles_do_the_work():
    long = Target("avx512_bf16", 16, 12, 2, 6, True, (), l2_bytes=1 << 20)
    amx = replace(long, tiles=True)
    assert [row_block(ExpertsSpec("bf16"), target) for target in (long, TARGET, amx)] == [512, 192, 192]
    assert row_block(ExpertsSpec("f32"), amx) == 512, "tiles multiply bf16"
