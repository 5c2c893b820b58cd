"""A proof that time cuts short: what was proved counts, and the rest is tried by the next compile."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from proof_layers import H, Loop, T

import moec
from moec import proof
from moec.proof import compare
from moec.proof.compare import Difference


@pytest.fixture(autouse=True)
def hardly_any_time(enough_time, tmp_path, monkeypatch):
    """One trial a compile: an hour passes between two looks at the clock."""
    hours = itertools.count(0.0, 3600.0)
    monkeypatch.setattr(proof, "time", SimpleNamespace(perf_counter=lambda: next(hours)))
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))


def report():
    torch.manual_seed(0)
    with torch.no_grad():
        return moec.explain(Loop(), torch.randn(T, H), moec_options={"rest": "eager", "kernels": "eager"})


def test_what_there_was_no_time_for_is_tried_by_the_next_compile():
    seen = [report().sites[0].proof for _ in range(4)]
    assert [text.partition(": ")[2].partition(", largest")[0] for text in seen] == [
        "1 routings, 2 left for want of time",
        "2 routings, 1 left for want of time",
        "3 routings",
        "3 routings",
    ]
    assert [text.startswith("proved before") for text in seen] == [False, False, False, True]


def test_a_later_trial_that_fails_refuses_what_was_proved_so_far(monkeypatch):
    assert "2 left" in report().sites[0].proof
    monkeypatch.setattr(compare.Runner, "trial", lambda self, trial, sizes: [Difference("y", 1.0, 0.0)])
    with pytest.warns(RuntimeWarning, match="computes something else"):
        assert [site.status for site in report().sites] == ["declined"]
