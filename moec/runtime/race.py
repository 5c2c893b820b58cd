"""The race: at first use of a layer and a bucket of sizes, eager's form and a few plans are timed, the fastest is kept.

The call's own result is the kernel's; what the others compute is thrown away. The winner is kept on disk, so that a
host races once for a size, and later processes choose the same without measuring.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from functools import lru_cache
from typing import TypeVar

import torch

from moec.codegen.tuning import Sizes, candidates
from moec.runtime import tune_cache
from moec.runtime.cpu import Kernel
from moec.runtime.tune_cache import DEFAULT, EAGER, Entry, Key

T = TypeVar("T")

BUDGET = 0.05  # seconds a race may take, or
CALLS = 4  # so many calls' worth where a call is long; the kernel and eager's form are timed twice in any case
_TURNS = 10
_PLANS = 4  # plans that race beside the default's
_CLEARLY = 0.95  # eager's form wins, and a plan beats the default's, with at most this share of its time


class Racer:
    """The races of one kernel. `None` stands for eager's form."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.chosen: dict[Key, Kernel | None] = {}
        self._racing = threading.Lock()

    def run(self, sizes: Sizes, call: Callable[[Kernel | None], T]) -> T:
        """`call` of the winner; at first use of a bucket of sizes, after a race."""
        key = self.kernel.key(sizes, torch.get_num_threads())
        if key in self.chosen:
            return call(self.chosen[key])
        if not self._racing.acquire(blocking=False):
            return call(self.kernel)  # another thread races: timings would disturb each other
        try:
            known = tune_cache.exact(key, self.kernel.made, tune_cache.load())
            if known is not None and known.eager > 0:
                self.chosen[key] = None if known.best == EAGER else self.kernel
                return call(self.chosen[key])
            result, self.chosen[key] = self._race(key, sizes, call, known)
            return result
        finally:
            self._racing.release()

    def _race(
        self, key: Key, sizes: Sizes, call: Callable[[Kernel | None], T], known: Entry | None
    ) -> tuple[T, Kernel | None]:
        plans = candidates(self.kernel.spec, sizes, self.kernel.target, key.threads, _PLANS + 1)[1:]
        runners: list[Kernel | None] = [self.kernel, None]
        if known is None:  # tuned plans have won over these already
            runners += [self.kernel.tuned(plan) for plan in plans]
        result = call(self.kernel)  # also fills what the first call fills: workspace, page tables
        taken = times(runners, call)
        order = [runner for runner in taken if runner is not None]
        best = min(order, key=lambda runner: taken[runner])
        if taken[best] > _CLEARLY * taken[self.kernel]:
            best = self.kernel
        winner = None if None in taken and taken[None] <= _CLEARLY * taken[best] else best
        _keep(self._entry(key, known, winner, taken))
        return result, winner

    def _entry(self, key: Key, known: Entry | None, winner: Kernel | None, taken: dict[Kernel | None, float]) -> Entry:
        eager, micros = 1e6 * taken[None], 1e6 * taken[winner]
        if known is not None:
            return replace(known, best=known.best if winner else EAGER, median=micros, eager=eager)
        best = EAGER if winner is None else str(winner.tuning) if winner.tuning else DEFAULT
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        default = 1e6 * taken[self.kernel]
        return Entry(key, self.kernel.made, best, "race", "first use", now, micros, 0.0, default, eager)


def _keep(entry: Entry) -> None:
    """Keep a winner on disk; where that fails, this process has raced for itself alone."""
    try:
        tune_cache.store([entry])
    except OSError as error:
        _warn_once(str(error))


@lru_cache(maxsize=4)
def _warn_once(reason: str) -> None:
    text = f"moec: what won a race is not kept for later processes: {reason}; set MOEC_CACHE_DIR"
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def times(runners: list[Kernel | None], call: Callable[[Kernel | None], object]) -> dict[Kernel | None, float]:
    """Each runner's least seconds, measured in turns within the budget; the kernel and eager's form at least twice."""
    found: dict[Kernel | None, float] = {}
    begin = time.perf_counter()
    budget = BUDGET
    for turn in range(_TURNS):
        for i, runner in enumerate(runners):
            start = time.perf_counter()
            if start - begin > budget and (i > 1 or turn > 1):
                continue
            call(runner)
            seconds = time.perf_counter() - start
            found[runner] = min(found.get(runner, seconds), seconds)
            if turn == 0 and i == 0:
                budget = max(BUDGET, CALLS * seconds)
    return found


@lru_cache(maxsize=1024)
def racer(kernel: Kernel) -> Racer:
    """The races of `kernel`."""
    return Racer(kernel)
