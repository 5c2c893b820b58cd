"""Time as the proof sees it: tests of what it finds do not depend on how busy the machine is."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from moec import proof


@pytest.fixture(autouse=True)
def enough_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by itself, so slowly that no trial is left out."""
    ticks = itertools.count(0.0, 1e-3)
    monkeypatch.setattr(proof, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
