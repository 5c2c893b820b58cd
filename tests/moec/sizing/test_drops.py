"""Capacities from recorded loads, their evidence, and LocMoE's bound: against brute force and known values."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from moec.errors import ParseError
from moec.sizing.angles import QUANTILES, Angles, least_capacity, least_capacity_simple
from moec.sizing.drops import capacity_of, dropped_of, share_at_most, size_for
from moec.sizing.loads import Load, read_loads, write_loads

ANGLES = Angles(64, 26, (-0.01, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08), 0.3)


def skewed(batches=30, experts=6, sizes=(40, 90)):
    """Loads that are uneven and differ from batch to batch."""
    chance = random.Random(0)
    made = []
    for i in range(batches):
        counts = [0] * experts
        for _ in range(sizes[i % len(sizes)]):
            counts[min(experts - 1, int(chance.expovariate(0.5)))] += 1
        made.append(tuple(counts))
    return Load("layer", sum(map(sum, made)), 1, experts, tuple(made))


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.05, 0.3])
def test_the_least_factor_that_keeps_the_rate(rate):
    load = skewed()
    found = size_for(load, rate)

    def dropped(factor):
        return sum(dropped_of(b, capacity_of(factor, sum(b), 6)) for b in load.batches) / found.pairs

    assert found.dropped == dropped(found.factor) <= rate
    steps = sorted({Fraction(c * 6, pairs) for pairs in (40, 90) for c in range(91)})
    assert dropped(steps[steps.index(found.factor) - 1]) > rate
    assert found.capacity == math.ceil(found.factor * 90 / 6)
    assert found.floor <= found.factor
    assert (found.batches, found.largest, found.pairs) == (30, 90, 15 * 130)
    assert found.over <= found.batches * found.at_most
    assert found.worst >= found.dropped
    if rate == 0:
        assert found.covered == 1.0
        assert found.at_most == pytest.approx(1 - 0.05 ** (1 / 30))


def test_all_rows_to_one_expert_and_even_rows():
    assert size_for(Load("a", 8, 1, 4, ((8, 0, 0, 0),)), 0.0).capacity == 8
    assert size_for(Load("a", 8, 1, 4, ((2, 2, 2, 2),)), 0.0).factor == 1
    assert size_for(Load("a", 8, 1, 4, ((8, 0, 0, 0),)), 0.5).capacity == 4


@pytest.mark.parametrize(("load", "rate"), [(skewed(), 1.0), (skewed(), -0.1), (Load("a", 0, 1, 2, ((0, 0),)), 0.1)])
def test_what_cannot_be_sized_says_why(load, rate):
    with pytest.raises(ParseError, match=r"expected|no rows"):
        size_for(load, rate)


def test_confidence_limits_are_the_exact_binomial_ones():
    assert share_at_most(0, 59) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert share_at_most(2, 100) == pytest.approx(0.06162, abs=1e-5)  # tables of Clopper and Pearson
    assert share_at_most(5, 5) == 1.0
    assert share_at_most(3, 4) == pytest.approx(0.95**0.25)


@pytest.mark.parametrize("channels", [3, 8, 64, 1024, 4096])
@pytest.mark.parametrize("delta", [0.01, 0.03, 0.1, 0.3])
def test_the_beta_function_is_above_the_exponential(channels, delta):
    exact, simple = (f(16, channels, delta) for f in (least_capacity, least_capacity_simple))
    assert exact > simple > 1 / 16


def test_the_bound_in_closed_form_and_at_its_ends():
    # D = 3: the cosine of a random direction is uniform, so 1 − I = 1 − δ.
    assert least_capacity(4, 3, 0.25) == pytest.approx(1 / (4 * 0.75))
    # D = 2: the angle is uniform.
    assert least_capacity(4, 2, 0.5) == pytest.approx(1 / (4 * (1 - 2 / math.pi * math.asin(0.5))))
    assert least_capacity(4, 64, -0.3) == least_capacity_simple(4, 64, 0.0) == 0.25
    assert least_capacity(4, 64, 1.0) == math.inf


def test_delta_leaves_out_the_largest_angles():
    assert [ANGLES.delta(q) for q in (0.0, 0.001, 0.005, 0.01)] == [-0.01, 0.01, 0.01, 0.02]
    assert not ANGLES.orthogonal
    assert len(ANGLES.cosines) == len(QUANTILES)


def test_loads_with_angles_are_read_back(tmp_path):
    loads = (Load("a", 4, 1, 2, ((1, 3),), ANGLES), Load("b", 4, 1, 2, ((2, 2),)))
    write_loads(loads, tmp_path / "loads.jsonl")
    assert read_loads(tmp_path / "loads.jsonl") == loads
    assert '"angles"' not in (tmp_path / "loads.jsonl").read_text().splitlines()[1]
    (tmp_path / "bad.jsonl").write_text(
        '{"site": "a", "tokens": 4, "k": 1, "experts": 2, "batches": [[1, 3]], '
        '"angles": {"channels": 64, "pairs": 4, "cosines": [0.5], "gates": 0}}'
    )
    with pytest.raises(ParseError, match="cosines"):
        read_loads(tmp_path / "bad.jsonl")
