"""Successive halving as a conversation: it asks for a measurement of one candidate, is told, and in the end decides.

Pure: the same answers give the same questions and the same decision, which is what makes a killed search resumable.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Generator, Sequence
from dataclasses import dataclass

MARGIN = 0.03  # the default is kept unless it is beaten by this share of its time
_LAST = 4  # candidates that are left in the end, the default among them: a winner's results may turn out wrong
_ENOUGH = 24  # measurements of each of them
_FEWEST = 8  # turns with the default in which a candidate may win
_MOSTLY = 0.8  # and the share of them in which it must be faster: a neighbour's load makes medians of few turns lie


@dataclass(frozen=True)
class Record:
    """One measurement of a candidate: seconds a call, what it cost in all, and what went wrong (empty: nothing)."""

    candidate: int
    seconds: float
    spent: float
    failed: str = ""


@dataclass(frozen=True)
class Standing:
    """A candidate in the end: its measurements, or what went wrong."""

    candidate: int
    seconds: tuple[float, ...]
    failed: str = ""

    @property
    def median(self) -> float:
        """Median seconds a call; infinity where there is none."""
        return statistics.median(self.seconds) if self.seconds and not self.failed else float("inf")

    @property
    def spread(self) -> float:
        """Slowest less fastest, in seconds."""
        return max(self.seconds) - min(self.seconds) if self.seconds else 0.0


@dataclass(frozen=True)
class Decision:
    """Candidates in order, best first; `winner` is 0, the default, unless another beat it by the margin, mostly."""

    winner: int
    standings: tuple[Standing, ...]

    def standing(self, candidate: int) -> Standing:
        """How one candidate did."""
        return next(s for s in self.standings if s.candidate == candidate)


def search(count: int, budget: float) -> Generator[int, Record, Decision]:
    """Ask for measurements of candidates 0 (the default) to `count` - 1 until `budget` seconds are spent.

    Rounds: all are measured in turns, the slower half is left out, the rest is measured twice as often. The default
    stays to the end, so that it and its rivals are measured side by side. Of candidates for whose rounds the budget is
    too small the last ones, which are the least promising, are not tried.
    """
    seconds: dict[int, list[float]] = {c: [] for c in range(count)}
    failed: dict[int, str] = {}

    def noted(record: Record) -> float:
        if record.failed:
            failed[record.candidate] = record.failed
        else:
            seconds[record.candidate].append(record.seconds)
        return record.spent

    spent = noted((yield 0))
    alive, turns, asked = list(range(_affordable(count, budget, spent))), 1, {0}
    while spent < budget and alive:
        for _ in range(turns):
            for candidate in alive:
                if candidate not in failed and candidate not in asked and spent < budget:
                    spent += noted((yield candidate))
            asked = set[int]()  # in the first turn the default has been
        alive = [c for c in alive if c not in failed]
        last = len(alive) <= _LAST
        if last and all(len(seconds[c]) >= _ENOUGH for c in alive):
            break
        alive = alive if last else _faster_half(alive, seconds)
        turns = turns if last else 2 * turns
    return decide(tuple(Standing(c, tuple(seconds[c]), failed.get(c, "")) for c in range(count)))


def _affordable(count: int, budget: float, cost: float) -> int:
    """How many candidates that cost `cost` seconds a measurement can be halved, and the last measured often enough."""

    def measurements(n: int) -> int:  # each round has as many as the first
        return n * (1 + math.ceil(math.log2(n / _LAST))) + _LAST * _FEWEST

    return next((n for n in range(count, _LAST, -1) if measurements(n) * cost <= budget), min(count, _LAST))


def _faster_half(alive: Sequence[int], seconds: dict[int, list[float]]) -> list[int]:
    measured = sorted((c for c in alive if seconds[c]), key=lambda c: (statistics.median(seconds[c]), c))
    kept = measured[: max(_LAST, (len(measured) + 1) // 2)]
    if 0 in measured and 0 not in kept:
        kept[-1] = 0
    return sorted(kept)


def decide(standings: Sequence[Standing]) -> Decision:
    """The winner: the best of those that beat the default, else the default."""
    order = tuple(sorted(standings, key=lambda s: (s.median, s.candidate)))
    default = next(s for s in standings if s.candidate == 0)
    winner = next((s.candidate for s in order if s.candidate and _beats(s, default)), 0)
    return Decision(winner, order)


def _beats(rival: Standing, default: Standing) -> bool:
    """Whether a rival was faster by the margin, and mostly faster, in the turns that it had with the default."""
    if rival.failed or len(rival.seconds) < _FEWEST:
        return False
    if default.failed:
        return True
    ratios = [one / other for one, other in zip(rival.seconds, default.seconds, strict=False)]
    faster = sum(ratio < 1 for ratio in ratios)
    return len(ratios) >= _FEWEST and statistics.median(ratios) < 1 - MARGIN and faster >= _MOSTLY * len(ratios)
