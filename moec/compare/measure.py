"""Measuring on a shared machine: this host's ceilings, interleaved timing with a budget, and where it all was run."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moec.target import processor_name

SMALL_CALLS = 20  # one alone may wait for a thread that sleeps: 8 ms where the product takes 0.2


@dataclass(frozen=True)
class Ceilings:
    """What this host reached in this run: reading memory with all threads (GB/s) and matrix products (GFLOP/s).

    gemm is the best of the dtype asked for and fp32, whose arithmetic is bf16's limit on a host without bf16 products.
    native is torch.mm's own rate in the dtype asked for.
    """

    read: float
    gemm: float
    native: float


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, smallest and largest of `runs` calls."""

    median: float
    low: float
    high: float
    runs: int


def environment_line() -> str:
    """Where figures come from: processor, threads, torch, load."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    isa = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{processor_name()} · {threads} threads · {isa} · torch {torch.__version__} · load {load:.1f}"


def measure_ceilings(dtype: torch.dtype, read_bytes: int = 512 << 20, size: int = 2048) -> Ceilings:
    """This host's ceilings, in about two seconds."""
    read = read_bytes / _best(torch.ones(read_bytes // 4).sum, 5) / 1e9
    full = _gemm_rate(torch.float32, size, 5)
    native = full if dtype is torch.float32 else _native_rate(dtype, size, full)
    return Ceilings(read, max(full, native), native)


def _native_rate(dtype: torch.dtype, size: int, full: float) -> float:
    """The dtype's rate; on a host without its instructions a small product says enough, a large one takes seconds."""
    small = _gemm_rate(dtype, min(size, 256), SMALL_CALLS, transposed=True)
    return small if small < full / 10 else max(small, _gemm_rate(dtype, size, 5, transposed=True))


def _gemm_rate(dtype: torch.dtype, size: int, repeats: int, transposed: bool = False) -> float:
    """Of x·W, or of x·Wᵀ as layers hold W: ten times the rate in bf16 where the host has no instructions for it."""
    a, w = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    b = w.t() if transposed else w
    return 2 * size**3 / _best(lambda: torch.mm(a, b), repeats) / 1e9


def _best(call: Callable[[], object], repeats: int) -> float:
    call()
    return min(_seconds(call) for _ in range(repeats))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def summary(seconds: list[float]) -> Timing:
    """Seconds of single calls → milliseconds."""
    return Timing(1e3 * statistics.median(seconds), 1e3 * min(seconds), 1e3 * max(seconds), len(seconds))


def interleaved(calls: Mapping[str, Callable[[], float]], repeats: int, budget: float) -> dict[str, Timing]:
    """Take seconds from the calls in turns, so that a neighbour's load falls on all alike. Each has run before (warm).

    Every round has an order of its own: threads of the call before may still spin, and no call shall meet that always.
    A call whose share of `budget` seconds is used up is left out of further turns: it keeps fewer runs, at least one.
    """
    share = budget / max(len(calls), 1)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in random.Random(turn).sample(list(calls), len(calls)):
            if not taken[name] or sum(taken[name]) + min(taken[name]) <= share:
                taken[name].append(calls[name]())
    return {name: summary(seconds) for name, seconds in taken.items()}


@dataclass(frozen=True)
class Layer:
    """Sizes of one MoE layer with gated experts."""

    hidden: int
    width: int
    experts: int
    top_k: int
    itemsize: int

    def flops(self, tokens: int) -> float:
        """Arithmetic of one forward: router and three products for each choice."""
        return 2.0 * tokens * self.hidden * (self.experts + 3 * self.top_k * self.width)

    def bytes_read(self, active: int) -> float:
        """Weights that must be read when `active` distinct experts are hit."""
        return float(self.itemsize * self.hidden * (self.experts + 3 * active * self.width))

    def limit_ms(self, tokens: int, active: int, ceilings: Ceilings) -> float:
        """The least time this host could take: arithmetic or memory, whichever is slower."""
        arithmetic = self.flops(tokens) / (ceilings.gemm * 1e9)
        return 1e3 * max(arithmetic, self.bytes_read(active) / (ceilings.read * 1e9))
