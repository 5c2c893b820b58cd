"""Matching costs a few milliseconds a layer, grows with the number of nodes, and costs next to nothing without MoE.

Growth is told by the number of calls, which no load changes; `benchmarks/matching_time.py` has times.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from moec.backend import Backend
from moec.options import Options
from moec.passes.raising.quick_look import can_hold_experts
from moec.report import Report

pytest.importorskip("transformers")
OPTIONS = Options.make({"rest": "eager", "kernels": "eager", "proof": "off"})


@pytest.fixture(scope="module")
def matching():
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    try:
        import matching_time

        return matching_time
    finally:
        sys.path.pop(0)


def calls(gm):
    """How many functions are called to match a graph, and what was found."""
    seen, report = Counter(), Report()

    def count(frame, event, argument):
        seen[event] += 1

    backend = Backend(OPTIONS, report=report)
    sys.setprofile(count)
    try:
        said = backend.rewrite(gm)
    finally:
        sys.setprofile(None)
    return seen["call"] + seen["c_call"], said


def test_repeated_layers_cost_the_same_each(matching):
    one = matching.captured(
        matching.FORMS["stacked weights, gathered"](8), torch.randn(matching.TOKENS, matching.HIDDEN)
    )
    calls(matching.repeated(one, 1))  # caches
    few, said = calls(matching.repeated(one, 3))
    many, more = calls(matching.repeated(one, 12))
    assert [len(said.sites), len(more.sites)] == [3, 12]
    assert all(site.status == "fused" for site in more.sites)
    assert many <= 4.2 * few


def test_a_graph_without_experts_costs_in_proportion_to_its_nodes(matching):
    """Also where it is looked at in full, because somebody reads the report."""
    calls(matching.without_experts(50))
    few, said = calls(matching.without_experts(250))
    many, more = calls(matching.without_experts(1000))
    assert not said.sites
    assert not more.sites
    assert many <= 4.2 * few


class Doubled(torch.nn.Module):
    """A dense sum of experts that is added to itself, again and again: of 2^n terms, were it one sum."""

    def __init__(self, times):
        super().__init__()
        self.router = torch.nn.Linear(8, 3)
        self.experts = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 8)) for _ in range(3)
        )
        self.times = times

    def forward(self, x):
        top, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        gates = torch.zeros(x.shape[0], 3).scatter(1, ids, top)
        y = sum(gates[:, e, None] * expert(x) for e, expert in enumerate(self.experts))
        for _ in range(self.times):
            y = y + y
        return y


def test_sums_of_sums_are_not_walked_again_and_again(matching):
    captured = [matching.captured(Doubled(times), torch.randn(5, 8)) for times in (1, 4, 14)]
    calls(captured[0])  # caches
    few, said = calls(captured[1])
    many, more = calls(captured[2])
    assert [site.status for site in (*said.sites, *more.sites)] == ["fused"] * 2
    assert many <= 1.5 * few


def test_a_graph_without_experts_costs_next_to_nothing(matching):
    gm = matching.without_experts(10_000)
    assert not can_hold_experts(gm.graph)
    start = time.process_time()
    Backend(OPTIONS).rewrite(gm)
    assert time.process_time() - start < 0.2  # 2 s for 100 000 nodes


@pytest.mark.parametrize("form", ["stacked weights, gathered", "stacked weights, loop"])
def test_a_graph_with_experts_is_looked_at(matching, form):
    one = matching.captured(matching.FORMS[form](8), torch.randn(matching.TOKENS, matching.HIDDEN))
    assert can_hold_experts(one.graph)
