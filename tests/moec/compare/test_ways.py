"""Comparing ways to run a layer: real processes, tiny layers, and nothing that hangs."""

import importlib
import multiprocessing
import re
import time
import warnings
from pathlib import Path

import pytest
import torch

from moec.compare.measure import Ceilings, Layer, Timing, interleaved, measure_ceilings, summary
from moec.compare.view import cell, times_table
from moec.compare.ways import Budget, Row, Way, empty_cells, race, tokens_text
from moec.compare.worker import serve

LAYER = Layer(8, 4, 2, 1, 4)
CEILINGS = Ceilings(10.0, 100.0, 100.0)


@pytest.fixture(scope="module")
def ways():
    """compare_ways as a module that the processes can import too: they are given this sys.path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield importlib.import_module("compare_ways")


def run(ways, *tried, budget=None):
    steps = []
    budget = budget or Budget(call=10.0, prepare=1.0, timing=0.2, repeats=3)
    rows = race(tried, ways.INPUTS, LAYER, CEILINGS, lambda x: 2, budget, steps.append)
    assert len(steps) == (len(tried) + 1) * len(ways.INPUTS)
    return rows


@pytest.fixture(scope="module")
def rows(ways):
    builds = {
        "moec": ways.good,
        "wrong": ways.wrong,
        "hangs": ways.hangs_at_7,
        "dies": ways.dies,
        "fails": ways.fails,
    }
    start = time.monotonic()
    found = run(ways, *(Way(name, build, ()) for name, build in builds.items()))
    assert time.monotonic() - start < 120
    return found


def test_good_ways_are_timed_and_bad_ones_say_why(rows):
    one, seven = rows
    assert (one.tokens, seven.tokens) == (1, 7)
    assert one.times["moec"].runs >= 1
    assert one.skipped["wrong"].startswith("fails: ValueError: WRONG")
    assert "ended by itself" in one.skipped["dies"]
    assert "no such form" in one.skipped["fails"]


def test_a_way_that_hangs_is_stopped_and_keeps_what_it_had(rows):
    one, seven = rows
    assert one.times["hangs"].runs == 1
    assert re.fullmatch(r"> \d s \(stopped in its first call\)", seven.skipped["hangs"])
    assert "dies, 7 tokens" in "\n".join(empty_cells(rows))


def test_a_way_that_dies_while_it_is_timed_leaves_the_others_their_times(ways):
    rows = run(ways, Way("moec", ways.good, ()), Way("dies", ways.dies_when_timed, ()))
    one, seven = rows
    assert min(one.times["moec"].runs, seven.times["moec"].runs) >= 1
    assert "ended by itself" in one.skipped["dies"]
    assert seven.times["dies"].runs == 1  # the warm call that it had made before


def test_table_and_ratios(rows):
    one = rows[0]
    assert one.best == "hangs"
    assert cell(one, "wrong") == "fails"
    assert cell(one, "hangs").endswith("×")
    assert times_table("t", rows, ["moec", "hangs"]).row_count == 5


def test_hopeless_and_late_ways_are_not_even_started(ways):
    slow = Ceilings(10.0, 100.0, 1e-9)
    late = Budget(call=10.0, prepare=1.0, timing=0.1, end=time.monotonic(), repeats=1)
    rows = race([Way("other", ways.good, ())], ways.INPUTS, LAYER, slow, lambda x: 1, late, lambda text: None)
    assert all("s a call" in row.skipped["other"] for row in rows)
    rows = race([Way("other", ways.good, ())], ways.INPUTS, LAYER, CEILINGS, lambda x: 1, late, lambda text: None)
    assert all(row.skipped["other"] == "not run: out of time" for row in rows)
    big = Layer(8192, 8192, 2, 2, 4)
    rows = race(
        [Way("other", ways.good, (), gathers=True)], ways.INPUTS, big, CEILINGS, lambda x: 1, late, lambda text: None
    )
    assert all("would copy" in row.skipped["other"] for row in rows)


def test_interleaving_gives_each_its_share():
    calls = {"cheap": lambda: 0.001, "dear": lambda: 0.4}
    found = interleaved(calls, repeats=9, budget=1.0)
    assert found["cheap"] == Timing(1.0, 1.0, 1.0, 9)
    assert found["dear"].runs == 1
    assert summary([0.003, 0.001, 0.002]) == Timing(2.0, 1.0, 3.0, 3)


def test_no_call_follows_the_same_one_in_every_round():
    order: list[str] = []
    interleaved({name: lambda name=name: order.append(name) or 0.001 for name in "abc"}, repeats=12, budget=1.0)
    rounds = [order[i : i + 3] for i in range(0, 36, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    followed = {each[each.index("b") - 1] for each in rounds if each[0] != "b"}
    assert followed == {"a", "c"}


def test_limit_is_the_slower_of_arithmetic_and_memory():
    layer = Layer(hidden=100, width=10, experts=4, top_k=2, itemsize=2)
    assert layer.flops(3) == 2 * 3 * 100 * (4 + 3 * 2 * 10)
    assert layer.bytes_read(2) == 2 * 100 * (4 + 3 * 2 * 10)
    memory_bound = layer.limit_ms(3, 2, Ceilings(1e-3, 1e9, 1.0))
    assert memory_bound == pytest.approx(1e3 * layer.bytes_read(2) / 1e6)
    compute_bound = layer.limit_ms(3, 2, Ceilings(1e9, 1e-3, 1.0))
    assert compute_bound == pytest.approx(1e3 * layer.flops(3) / 1e6)


def test_ceilings_are_positive_and_the_best_counts():
    found = measure_ceilings(torch.bfloat16, read_bytes=1 << 20, size=64)
    assert found.read > 0
    assert found.gemm >= found.native > 0


def test_best_is_never_moec():
    timing = Timing(1.0, 1.0, 1.0, 3)
    assert Row(1, 1, 1.0, {"moec": timing, "moec (on grouped_mm)": timing}, {}).best is None
    assert tokens_text(1) == "1 token"
    assert tokens_text(1, 8) == "1, 8 tokens"


def test_a_way_that_answers_nobody_ends_quietly(ways):
    here, there = multiprocessing.Pipe()
    here.send(("start", 1))
    here.close()
    with warnings.catch_warnings():
        assert serve(there, ways.good, ()) is None
    there.close()
