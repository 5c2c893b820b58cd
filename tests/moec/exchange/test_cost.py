"""The model of an exchange beside what is counted over random tokens and ranks, and beside closed forms."""

import itertools
import math

import numpy as np
import pytest

from moec.exchange.cost import RowBytes, chances_of, odds_of, reach, recorded_reach, rows_of
from moec.exchange.placement import Placement
from moec.exchange.travel import Exchange


@pytest.mark.parametrize(("experts", "k", "ranks"), [(8, 2, 4), (64, 8, 16), (7, 7, 3), (5, 1, 8), (128, 8, 1024)])
def test_even_loads_are_the_hypergeometric(experts, k, ranks):
    placement = Placement.blocks(experts, ranks)
    found = reach(chances_of([0] * experts, k), k, placement, 1)
    missed = [math.comb(experts - n, k) / math.comb(experts, k) for n in placement.held]
    assert found.ranks == pytest.approx(ranks - sum(missed))
    assert found.ranks == pytest.approx(found.nodes)


def test_odds_give_the_loads():
    """All sets of 3 of 6 experts, as likely as the products of their odds: each expert is in as many as was asked."""
    chances = np.array([0.9, 0.8, 0.6, 0.4, 0.3, 0.0])
    odds = odds_of(chances, 3)
    weights = {s: math.prod(odds[list(s)]) for s in itertools.combinations(range(6), 3)}
    total = sum(weights.values())
    for expert, chance in enumerate(chances):
        assert sum(w for s, w in weights.items() if expert in s) / total == pytest.approx(chance, abs=1e-6)
    placement = Placement((0, 0, 1, 1, 2, 2), 3)
    met = sum(w * len({placement.owners[e] for e in s}) for s, w in weights.items()) / total
    assert reach(chances, 3, placement, 1).ranks == pytest.approx(met)


@pytest.mark.parametrize("loads", [[5, 0, 0, 0], [1, 1, 1, 1], [1000, 1, 1, 1]])
def test_loads_that_no_choice_of_k_gives_are_met_as_far_as_possible(loads):
    found = reach(chances_of(loads, 2), 2, Placement.blocks(4, 4), 1)
    assert 1 <= found.ranks <= 2 + 1e-6


def counted(choices, placement, size):
    """Rows that change their rank, and of these those that change their node, a token, over every home of every token.

    For one row a choice, for one a rank, and along the hops of a two-level exchange.
    """
    ranks = placement.ranks
    totals = {name: [0, 0] for name in ("per choice", "per rank", "per node")}
    for chosen, home in itertools.product(choices, range(ranks)):
        owners = [placement.owners[e] for e in chosen]
        moves = {
            "per choice": [(home, owner) for owner in owners],
            "per rank": [(home, owner) for owner in set(owners)],
            "per node": list({hop for e in chosen for hop in hops(placement, size, home, e)}),
        }
        for name, hops_made in moves.items():
            totals[name][0] += sum(a != b for a, b in hops_made)
            totals[name][1] += sum(a // size != b // size for a, b in hops_made)
    return {name: [n / len(choices) / ranks for n in both] for name, both in totals.items()}


def hops(placement, size, home, expert):
    exchange, at = Exchange("", "", placement, size), home
    for hop in range(2):
        there = exchange.targets(at)[hop][expert]
        yield at, there
        at = there


@pytest.mark.parametrize(("ranks", "size"), [(4, 2), (6, 3), (8, 2)])
def test_rows_are_those_that_an_exchange_sends(ranks, size):
    rng = np.random.default_rng(0)
    choices = [rng.choice(12, 4, replace=False).tolist() for _ in range(40)]
    placement = Placement(tuple(int(r) for r in rng.integers(0, ranks, 12)), ranks)
    modelled = rows_of(recorded_reach(choices, placement, size), 4, ranks, size)
    for name, (moved, crossed) in counted(choices, placement, size).items():
        assert modelled[name].ranks == pytest.approx(moved), name
        assert modelled[name].nodes == pytest.approx(crossed), name


def test_nodes_of_one_rank_or_one_node_have_no_second_level():
    found = reach(chances_of([0] * 8, 2), 2, Placement.blocks(8, 4), 1)
    assert list(rows_of(found, 2, 4, 1)) == ["per choice", "per rank"]
    assert rows_of(found, 2, 4, 4)["per rank"].nodes == 0


def test_bytes_of_a_row():
    """x[H] with k numbers and weights there, y[H] back; in backward the same and dy there, dx and k slopes back."""
    size = RowBytes.of(hidden=100, x=2, y=2, weight=4, carried=8)
    there, back = 200 + 8 * 8, 200
    assert size.forward == there + back
    assert size.step == there + back + (there + 200) + (200 + 8 * 4)


def test_the_busiest_rank():
    assert reach(np.array([1.0, 0.5, 0.25, 0.25]), 2, Placement.blocks(4, 2), 1).busiest == pytest.approx(1.5)
    assert recorded_reach([[0], [0], [1]], Placement.blocks(2, 2), 1).busiest == pytest.approx(4 / 3)
    assert recorded_reach([], Placement.blocks(2, 2), 1).busiest == 1
