"""Several ways to run one MoE layer, side by side: each in a process of its own, timed in turns, set against the limit.

A process of its own, because ways share code objects and torch.compile's caches hang on those (one way's graph break
would slow another down), and because a call that takes too long inside a kernel can only be ended from outside.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol
from unittest import mock

from torch import Tensor

from moec.children import start_child
from moec.compare.measure import Ceilings, Layer, Timing, interleaved, summary
from moec.compare.worker import Built, serve

MOEC = "moec"
MAX_COPY = 1 << 30  # bytes; a form that gathers weights for every choice is no alternative beyond this
LEAST_TIMING = 4.0  # seconds for one token count, even when the budget is used up
START_SECONDS = 120.0  # for a process to import torch and make its weights


@dataclass(frozen=True)
class Way:
    """One way to run the layer: `build(*args)` makes it, in its own process.

    compiles: its first call compiles. gathers: it copies the weights of every choice.
    """

    name: str
    build: Callable[..., Built]
    args: tuple[Any, ...]
    compiles: bool = False
    gathers: bool = False

    @property
    def ours(self) -> bool:
        """Is this moec? Then nothing that torch's own products take is a reason to skip it."""
        return self.name.startswith(MOEC)


@dataclass(frozen=True)
class Row:
    """One token count: times by name, what was not run and why, and the limit."""

    tokens: int
    active: int
    limit_ms: float
    times: Mapping[str, Timing]
    skipped: Mapping[str, str]

    @property
    def best(self) -> str | None:
        """The fastest of those that are not moec."""
        others = {name: timing.median for name, timing in self.times.items() if not name.startswith(MOEC)}
        return min(others, key=others.__getitem__) if others else None


@dataclass(frozen=True)
class Budget:
    """Seconds: the slowest call worth waiting for, one way's preparation (with compiling), timing one token count.

    `end` is when (time.monotonic()) everything but moec itself must be over; the last `reserve` seconds are for timing.
    """

    call: float
    prepare: float
    timing: float
    end: float = float("inf")
    repeats: int = 9
    reserve: float = 0.0

    def left(self) -> float:
        """Until the end."""
        return self.end - time.monotonic()

    def left_to_prepare(self) -> float:
        """Until preparing must stop."""
        return self.left() - self.reserve


class Progress(Protocol):
    """Told before each step."""

    def __call__(self, text: str) -> None:
        """Show it."""
        ...


class NoAnswer(Exception):
    """The process of `way` said that it failed, ended, or did not answer in time."""

    def __init__(self, way: str, why: str) -> None:
        super().__init__(f"{way}: {why}")
        self.way, self.why = way, why


@dataclass
class Worker:
    """The process of one way, asked over a pipe; `lost` says why it is no more."""

    way: Way
    process: BaseProcess
    pipe: Connection
    lost: str = ""

    def ask(self, word: str, tokens: int, seconds: float, doing: str) -> float:
        """Its answer; raises NoAnswer where there is none after `seconds` (the process is stopped) or it failed."""
        try:
            self.pipe.send((word, tokens))
            if not self.pipe.poll(max(seconds, 0.0)):
                self.end()
                self.lost = f"its process was stopped at {tokens_text(tokens)}"
                raise NoAnswer(self.way.name, f"> {max(seconds, 0.0):.0f} s (stopped {doing})")
            answer, value = self.pipe.recv()
        except (EOFError, OSError):
            self.lost = f"its process {self._ended()} at {tokens_text(tokens)}"
            raise NoAnswer(self.way.name, f"fails: {self.lost}") from None
        if answer == "failed":
            raise NoAnswer(self.way.name, f"fails: {value}")
        return value

    def _ended(self) -> str:
        """How the process ended that closed its pipe: `ended by itself`, or by which signal."""
        self.process.join(1.0)
        code = self.process.exitcode or 0
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else "ended by itself"

    def end(self) -> None:
        """Stop the process, whatever it is doing."""
        self.pipe.close()
        self.process.join(0.5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextmanager
def _started(way: Way) -> Generator[Worker]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, way.build, way.args), name=f"moec {way.name}")
    start_child(process)
    there.close()
    worker = Worker(way, process, here)
    try:
        yield worker
    finally:
        worker.end()


@dataclass
class _Race:
    layer: Layer
    ceilings: Ceilings
    budget: Budget
    stack: ExitStack
    workers: dict[str, Worker] = field(default_factory=dict[str, Worker])
    first: dict[tuple[int, str], float] = field(default_factory=dict[tuple[int, str], float])
    skipped: dict[tuple[int, str], str] = field(default_factory=dict[tuple[int, str], str])


def race(
    ways: Sequence[Way],
    inputs: Mapping[int, Tensor],
    layer: Layer,
    ceilings: Ceilings,
    active: Callable[[Tensor], int],
    budget: Budget,
    step: Progress,
) -> tuple[Row, ...]:
    """Prepare all ways for all inputs, those that compile last; then time what is ready, token count by token count.

    active(x) counts the distinct experts hit. Progress: (len(ways) + 1) · len(inputs) steps.
    """
    _quiet_tracker()
    with ExitStack() as stack:
        running = _Race(layer, ceilings, budget, stack)
        for way in sorted(ways, key=lambda way: way.compiles and not way.ours):
            for tokens in inputs:
                step(f"{way.name}: {tokens_text(tokens)}")
                why = _skip(running, way, tokens) or _prepare(running, way, tokens)
                if why:
                    running.skipped[tokens, way.name] = why
        rows: list[Row] = []
        for tokens, x in inputs.items():
            step(f"timing: {tokens_text(tokens)}")
            seconds = min(budget.timing, max(budget.left() / (len(inputs) - len(rows)), LEAST_TIMING))
            times = _times(running, ways, tokens, seconds)
            skipped = {
                way.name: running.skipped[tokens, way.name] for way in ways if (tokens, way.name) in running.skipped
            }
            hit = active(x)
            rows.append(Row(tokens, hit, layer.limit_ms(tokens, hit, ceilings), times, skipped))
        return tuple(rows)


def _quiet_tracker() -> None:
    """Start multiprocessing's tracker so that it does not complain about what killed processes leave to it."""
    with mock.patch.dict(os.environ, PYTHONWARNINGS="ignore"):
        resource_tracker.ensure_running()


def _times(running: _Race, ways: Sequence[Way], tokens: int, seconds: float) -> dict[str, Timing]:
    """Timings of what is ready; of a process that was ended since, the one warm call that it had made."""
    known = {way.name: running.workers[way.name] for way in ways if (tokens, way.name) in running.first}
    once = {name: summary([running.first[tokens, name]]) for name, worker in known.items() if worker.lost}
    question = ("time", tokens, START_SECONDS, "while it was timed")
    alive = {name: partial(worker.ask, *question) for name, worker in known.items() if not worker.lost}
    while True:  # anew without a way whose process is lost meanwhile (the machine's memory ran out, say)
        try:
            return once | interleaved(alive, running.budget.repeats, seconds)
        except NoAnswer as error:
            del alive[error.way]
            running.skipped[tokens, error.way] = error.why


def _skip(running: _Race, way: Way, tokens: int) -> str:
    """Why this way is not even tried; empty where it is."""
    layer, ceilings = running.layer, running.ceilings
    copied = layer.itemsize * 3 * tokens * layer.top_k * layer.hidden * layer.width
    predicted = layer.flops(tokens) / (ceilings.native * 1e9)
    known = running.workers.get(way.name)
    if known and known.lost:
        return f"not run: {known.lost}"
    if way.gathers and copied > MAX_COPY:
        return f"not run: would copy {copied / 1e9:.0f} GB of weights"
    if way.ours:
        return ""
    if predicted > running.budget.call:
        return f"not run: ~{predicted:.0f} s a call (this dtype's products at {ceilings.native:.1f} GFLOP/s)"
    return "not run: out of time" if running.budget.left_to_prepare() < 1 else ""


def _prepare(running: _Race, way: Way, tokens: int) -> str:
    """Start the process, compile and call; says why not, where that takes too long, fails or is wrong."""
    known = running.workers.get(way.name)
    wanted, left = running.budget.prepare, running.budget.left_to_prepare()
    seconds = max(START_SECONDS, wanted) if way.ours else min(wanted, left)
    worker = known or running.workers.setdefault(way.name, running.stack.enter_context(_started(way)))
    doing = "while compiling" if way.compiles else "in its first call"
    try:
        if known is None:
            worker.ask("start", tokens, START_SECONDS, "as it began")
        running.first[tokens, way.name] = worker.ask("first", tokens, seconds, doing)
    except NoAnswer as error:
        return error.why
    return ""


def empty_cells(rows: Iterable[Row]) -> list[str]:
    """Why cells are empty: each reason once, with its token counts."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        for name, reason in row.skipped.items():
            reasons.setdefault((name, reason), []).append(row.tokens)
    return [f"{name}, {tokens_text(*tokens)}: {reason}" for (name, reason), tokens in reasons.items()]


def tokens_text(*tokens: int) -> str:
    """`1 token`, `8, 64 tokens`."""
    return f"{', '.join(map(str, tokens))} token{'' if tokens == (1,) else 's'}"
