"""Bounds in terms of T hold for every T: rows by brute force, bytes against what plans and launches really ask for."""

from __future__ import annotations

import itertools

import pytest
import sympy

from moec.codegen.backward_plan import backward_formula, make_backward_plan
from moec.codegen.plan import Rows, Sizes, make_plan, workspace_formula
from moec.codegen.triton_config import default_config
from moec.codegen.triton_launch import buffer_formula, program
from moec.ir.bounds import TOKENS, Choices
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.target import Target

TARGET = Target("avx2", 8, 6, 2, 3, False, ())
COUNTS = (1, 2, 7, 8, 13, 15, 16, 17, 31, 200, 1000, 5000, 20000)
SHAPES = ((64, 48, 8, 2), (2048, 768, 64, 8), (16, 24, 4, 4), (128, 1, 512, 1))
SPECS = (
    KernelSpec(ExpertsSpec(), RouterSpec()),
    KernelSpec(ExpertsSpec("bf16"), RouterSpec("bf16"), "bf16"),
    KernelSpec(ExpertsSpec(weight_on="input"), None),
)


def loads(T, E, k, distinct):
    """Every way to spread the choices over experts, as rows of each."""
    most = T if distinct else T * k
    return (c for c in itertools.product(range(most + 1), repeat=E) if sum(c) == T * k)


@pytest.mark.parametrize(("T", "E", "k"), [(1, 3, 1), (3, 3, 2), (5, 3, 1), (4, 2, 2), (5, 4, 2)])
@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("limit", [None, 0, 1, 2, 4])
def test_rows_are_bounded_for_every_choice_and_the_bounds_are_reached(T, E, k, distinct, limit):
    found = Choices(T, E, k, distinct, limit)
    cap = T * k if limit is None else limit
    kept = [tuple(min(rows, cap) for rows in counts) for counts in loads(T, E, k, distinct)]
    assert found.rows == max(map(max, kept))
    assert found.kept >= max(map(sum, kept))
    assert found.dropped == T * k - min(map(sum, kept))
    assert found.never_drops == (found.dropped == 0)
    for block in (1, 2, 3):
        padded = [sum(-(-rows // block) * block for rows in counts) for counts in kept]
        assert max(padded) <= found.padded(block) <= T * k + E * (block - 1)


def test_groups_of_tokens_queue_apart():
    found = Choices(12, 4, 2, distinct=True, limit=2, queues=3)
    assert (found.rows, found.kept, found.dropped) == (6, 24, 12)


def test_rows_as_formulas():
    factor = Choices(TOKENS, 8, 2, distinct=True, limit=sympy.ceiling(TOKENS / 2))
    assert str(factor.rows) == "ceiling(T/2)"
    assert not factor.never_drops
    assert Choices(TOKENS, 8, 2, distinct=True, limit=TOKENS).never_drops
    assert not Choices(TOKENS, 8, 2, distinct=False, limit=TOKENS).never_drops
    assert Choices(TOKENS, 8, 1, distinct=True, limit=4 * sympy.ceiling(TOKENS / 4)).never_drops
    for T in (1, 7, 200):
        assert int(factor.padded(16).subs(TOKENS, T)) == Choices(T, 8, 2, True, -(-T // 2)).padded(16)


def check_bound(formula, real, tight, more=0):
    """The formula is no smaller than what is asked for, and not much larger from `tight` tokens on, but for `more`."""
    for T in COUNTS:
        bound, asked = int(formula.subs(TOKENS, T)), real(T)
        assert asked <= bound, (T, formula)
        assert tight > T or bound <= 1.1 * asked + more, (T, formula)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("threads", [1, 16])
def test_forward_workspace(spec, shape, threads):
    H, _, _, _ = shape
    for x in (Rows(spec.experts.dtype, H, True), Rows("f32", H + 1, False)):
        formula = workspace_formula(spec, Sizes(COUNTS[-1], *shape), x, TARGET, threads)

        def real(T, x=x):
            return make_plan(spec, Sizes(T, *shape), x, TARGET, threads).workspace_bytes

        check_bound(formula, real, tight=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("distinct", [True, False])
def test_backward_workspace(spec, shape, distinct):
    H, _, E, k = shape
    x, rows = Rows("f32", H, True), Choices(TOKENS, E, k, distinct).rows
    formula = backward_formula(spec, Sizes(COUNTS[-1], *shape), x, x, rows, TARGET, 2)

    def real(T):
        return make_backward_plan(spec, Sizes(T, *shape), x, x, int(rows.subs(TOKENS, T)), TARGET, 2).workspace_bytes

    check_bound(formula, real, tight=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS)
def test_triton_buffers(spec, shape):
    formula = buffer_formula(spec, Sizes(COUNTS[-1], *shape), spec.router is not None)

    def real(T):
        sizes = Sizes(T, *shape)
        return sum(buffer.bytes for buffer in program(spec, sizes, default_config(spec, sizes)).buffers)

    # Where tokens are few a router's sums are split, and pairs counted in groups: which, depends on more than T.
    check_bound(formula, real, tight=200, more=(33 + (8192 if spec.router else 0)) * shape[2] * 4)
