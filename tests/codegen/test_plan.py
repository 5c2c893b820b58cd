"""Plans are pure: their workspaces hold what they must, without overlap, and do not grow without bound."""

import pytest

from moec.codegen.plan import Rows, Sizes, make_plan
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.target import Target

TARGET = Target("avx2", 8, 6, 2, 3, False, ())
F32 = KernelSpec(ExpertsSpec(), RouterSpec())
BF16 = KernelSpec(ExpertsSpec("bf16"), RouterSpec("bf16"), "bf16")


def plan(T, spec=F32, H=2048, F=768, E=64, k=8, threads=2, x=None):
    return make_plan(spec, Sizes(T, H, F, E, k), x or Rows(spec.experts.dtype, H, True), TARGET, threads)


@pytest.mark.parametrize("T", [0, 1, 7, 200, 5000])
@pytest.mark.parametrize("spec", [F32, BF16])
def test_sections_do_not_overlap_and_are_aligned(T, spec):
    p = plan(T, spec)
    tokens = min(T, p.tuning.chunk)
    h, out, threads = p.places[-3], p.places[-2], p.places[-1]
    assert out - h >= tokens * 8 * p.ld_h * 4
    assert threads - out >= tokens * 8 * 2048 * 4
    assert p.workspace_bytes == threads + 2 * p.per_thread
    assert all(place % 64 == 0 for place in p.places)
    assert list(p.places[1:]) == sorted(p.places[1:])
    assert p.per_thread % 4096 == 0


def test_rows_in_the_workspace_are_never_a_page_apart():
    for width in (64, 512, 768, 1024, 2048, 4096, 7168):
        p = plan(64, H=width, F=width)
        assert p.ld_x >= width
        assert p.ld_x * 4 % 4096
        assert p.ld_h * 4 % 4096


def test_x_is_read_in_place_only_where_it_can_be():
    assert plan(1).x_direct
    assert plan(1).router_direct
    assert not plan(1, BF16).x_direct
    assert not plan(1, x=Rows("f32", 1, False)).x_direct
    assert not plan(64).x_direct  # rows 8 KiB apart would evict each other
    assert plan(64, H=2049, x=Rows("f32", 2049, True)).x_direct
    on_input = KernelSpec(ExpertsSpec(weight_on="input"), RouterSpec())
    assert not plan(1, on_input).x_direct


def test_router_and_experts_share_a_copy_of_x_only_if_neither_rounds_it():
    assert plan(9, BF16).places[0] == plan(9, BF16).places[1]
    rounding = KernelSpec(ExpertsSpec("bf16"), RouterSpec("f32"), "bf16")
    mixed = plan(9, rounding, x=Rows("f32", 2048, True))
    assert mixed.places[0] != mixed.places[1] or mixed.router_direct


def test_workspace_is_bounded_for_long_inputs():
    short, long = plan(4096), plan(1_000_000)
    assert long.tuning.chunk == short.tuning.chunk
    assert long.workspace_bytes < 400 << 20


def test_words_are_whole_numbers_in_a_fixed_count():
    assert {len(plan(T, s).words) for T in (1, 100) for s in (F32, BF16)} == {38}
    assert all(type(word) is int for word in plan(3).words)
