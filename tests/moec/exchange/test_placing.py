"""Placements, their files, and experts placed by what is chosen together."""

import itertools

import numpy as np
import pytest

from moec.errors import ParseError
from moec.exchange.cost import recorded_reach
from moec.exchange.placement import Placement, Placements, read_placements, write_placements
from moec.exchange.placing import place, together
from moec.exchange.travel import Exchange


@pytest.mark.parametrize(("experts", "ranks"), list(itertools.product((1, 2, 5, 6, 8, 13), (1, 2, 4, 7))))
def test_blocks_are_even_and_in_order(experts, ranks):
    blocks = Placement.blocks(experts, ranks)
    assert list(blocks.owners) == sorted(blocks.owners)
    assert max(blocks.held) - min(blocks.held) <= 1
    assert sum(blocks.held) == experts


@pytest.mark.parametrize(
    ("owners", "ranks", "part"), [((0, 2), 2, "expert 1 on rank 2"), ((-1,), 2, "on rank -1"), ((), 2, "0 experts")]
)
def test_what_is_no_placement(owners, ranks, part):
    with pytest.raises(ParseError, match=part):
        Placement(owners, ranks)


def test_files(tmp_path):
    path = tmp_path / "placed.json"
    placements = Placements(3, {"a.b": Placement((2, 0, 1, 2), 3)})
    write_placements(placements, path)
    assert read_placements(path) == placements
    assert read_placements(path).of("a.b", 4).owners == (2, 0, 1, 2)
    assert read_placements(path).of("other", 3).owners == (0, 1, 2)
    with pytest.raises(ParseError, match=r"'a\.b' has 4 experts, the layer 5"):
        placements.of("a.b", 5)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"ranks": 2}', '{"ranks": "2", "layers": {}}', '{"ranks": 2, "layers": {"a": [0, 2]}}',
     '{"ranks": 2, "layers": {"a": [0.5]}}', '{"ranks": 2, "layers": {"a": 1}}', '{"ranks": 2, "layers": [1]}'],
)  # fmt: skip
def test_files_that_are_none(tmp_path, text):
    path = tmp_path / "placed.json"
    path.write_text(text)
    with pytest.raises(ParseError, match="not a file of placements"):
        read_placements(path)
    with pytest.raises(ParseError, match="No such file"):
        read_placements(tmp_path / "none.json")


@pytest.mark.parametrize("size", [0, 1, 2, 3, 6])
def test_hops_lead_to_the_owner_and_cross_nodes_once(size):
    exchange = Exchange('a "layer"', "my group", Placement((5, 0, 3, 3, 1, 2, 4), 6), size)
    assert Exchange.parse(str(exchange)) == exchange
    for start, expert in itertools.product(range(6), range(7)):
        at, crossed = start, 0
        for hop in range(len(exchange.targets(0))):
            there = exchange.targets(at)[hop][expert]
            crossed += there // (size or 6) != at // (size or 6)
            at = there
        assert at == exchange.placement.owners[expert]
        assert crossed <= 1
        assert len(exchange.targets(0)) == (2 if size in (2, 3) else 1)


def clustered(groups, tokens, seed=0):
    """Tokens that choose most of their experts in one group; group g is every expert e with e % groups == g."""
    rng = np.random.default_rng(seed)
    for _ in range(tokens):
        group = rng.integers(groups)
        own = rng.choice(np.arange(group, 8 * groups, groups), 3, replace=False)
        yield [*map(int, own), int(rng.integers(8 * groups))]


def test_together_counts_pairs():
    counts = together([[0, 1], [1, 0], [1, 2], [-1, 2], [3, 3]], 4)
    assert counts.tolist() == [[0, 2, 0, 0], [2, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(("ranks", "size"), [(4, 0), (4, 2), (8, 2), (3, 0)])
def test_experts_that_go_together_are_put_together(ranks, size):
    choices = list(clustered(4, 1200))
    loads = np.bincount(np.concatenate(choices), minlength=32)
    placed = place(together(choices[:600], 32), loads, ranks, size)
    blocks = Placement.blocks(32, ranks)
    assert sorted(placed.held) == sorted(blocks.held)
    better, even = (recorded_reach(choices[600:], each, size or 1) for each in (placed, blocks))
    assert better.ranks < 0.75 * even.ranks
    assert better.busiest <= 1.2
    if size:
        assert better.nodes < even.nodes


def test_without_structure_nothing_is_made_up():
    loads = np.full(12, 5.0)
    placed = place(np.zeros((12, 12)), loads, 4)
    assert placed.held == (3, 3, 3, 3)
    assert place(np.zeros((3, 3)), np.zeros(3), 8).held == Placement.blocks(3, 8).held


def test_loads_are_capped():
    loads = np.array([8.0, 8, 8, 8, 1, 1, 1, 1, 1, 1, 1, 1])
    weights = np.zeros((12, 12))
    weights[:4, :4] = 100  # the four busy ones are chosen together
    np.fill_diagonal(weights, 0)
    free, capped = place(weights, loads, 3, slack=9), place(weights, loads, 3, slack=0.3)
    rows = [np.bincount(each.owners, weights=loads, minlength=3).max() for each in (free, capped)]
    assert rows[0] == 32
    assert rows[1] <= 1.3 * loads.sum() / 3 + 4  # 13.3 is the mean, one of 8 more or less


def test_an_expert_that_is_too_busy_alone_does_not_hang():
    loads = np.array([100.0, 1, 1, 1, 1, 1, 1, 1])
    placed = place(together(list(clustered(1, 50)), 8), loads, 4)
    assert placed.held == (2, 2, 2, 2)


def test_sizes_that_do_not_fit():
    with pytest.raises(ParseError, match="in nodes of 2"):
        place(np.zeros((4, 4)), [1, 1, 1, 1], 3, 2)
    with pytest.raises(ParseError, match="of 3 experts"):
        place(np.zeros((4, 4)), [1, 1, 1], 2)
