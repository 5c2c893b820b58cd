"""A layer with capacity, written with [T, E, C] masks, by capacity factor: time and memory of moec beside eager.

    python benchmarks/capacity.py
    python benchmarks/capacity.py --tokens 256 --hidden 128 --width 256 --factors 0.5,1 --plot capacity.png

Each way has a process of its own; outputs are compared with eager's before anything is timed, and so are the tokens
that get nothing. Times are the least of calls taken one after another. Memory is what a call adds to resident memory
at its peak, beside the size of one [T, E, C] tensor. At factor 1 the seats are as many as the chosen pairs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, panels, save_figure, write_json
from rich.console import Console
from torch import Tensor, nn

from moec.compare.measure import environment_line
from moec.compare.view import plain_table

WAYS = ("eager", "moec")
PAGE = 4096


class CapacityMoE(nn.Module):
    """Top-2 with one-hot masks: a choice beyond an expert's C seats is dropped."""

    def __init__(self, hidden: int, width: int, experts: int, factor: float):
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, width) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) * width**-0.5)
        self.experts, self.factor = experts, factor

    def seats(self, tokens: int) -> int:
        """C: `factor` times the mean load."""
        return max(1, int(2 * self.factor * tokens / self.experts))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] → [T, H]."""
        capacity = self.seats(x.shape[0])
        weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        hot = F.one_hot(chosen, self.experts)
        flat = hot.view(-1, self.experts)
        place = ((flat.cumsum(0) - 1) * flat).sum(-1).view(x.shape[0], 2)
        seat = (place.unsqueeze(-1) == torch.arange(capacity)).to(x.dtype)
        combine = torch.einsum("tk,tke,tkc->tec", weights, hot.to(x.dtype), seat)
        dispatch = torch.einsum("tke,tkc->tec", hot.to(x.dtype), seat)
        rows = torch.einsum("tec,th->ech", dispatch, x)
        return torch.einsum("tec,ech->th", combine, torch.bmm(F.gelu(torch.bmm(rows, self.up)), self.down))


@dataclass(frozen=True)
class Cell:
    """One way at one factor. `dropped`: tokens whose every choice was; `mask_mb`: one tensor of T·E·C numbers."""

    way: str
    factor: float
    capacity: int
    ms: float
    extra_mb: float
    mask_mb: float
    dropped: int
    error: float


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that a call adds at its peak, looked up every 0.2 ms."""
    done, seen = threading.Event(), [before := resident()]

    def watch() -> None:
        while not done.is_set():
            seen.append(resident())
            time.sleep(0.0002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return max(seen) - before


def child(way: str, factor: float, asked: argparse.Namespace) -> Cell:
    """What one process does."""
    torch.manual_seed(0)
    model = CapacityMoE(asked.hidden, asked.width, asked.experts, factor).eval()
    x = torch.randn(asked.tokens, asked.hidden)
    with torch.no_grad():
        call = model if way == "eager" else torch.compile(model, backend="moec", options={"rest": asked.rest})
        y, extra = call(x), peak_of(lambda: call(x))
        want = model(x) if way != "eager" else y
        times: list[float] = []
        for _ in range(asked.repeats):
            start = time.perf_counter()
            call(x)
            times.append(time.perf_counter() - start)
    gone, expected = (t.abs().amax(-1) == 0 for t in (y, want))
    error = float((y - want).norm() / want.norm())
    if error > 1e-4 or not torch.equal(gone, expected):
        sys.exit(f"{way} at factor {factor}: relative error {error:.1e}, {int((gone != expected).sum())} drops differ")
    seats = model.seats(asked.tokens)
    mask = 4e-6 * asked.tokens * asked.experts * seats
    return Cell(way, factor, seats, 1e3 * min(times), extra / 1e6, mask, int(gone.sum()), error)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 1024), ("hidden", 512), ("width", 1024), ("experts", 16), ("repeats", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--factors", default="0.25,0.5,1,2,4", help="of the mean load, separated by commas")
    parser.add_argument("--rest", default="inductor", help="who compiles what is not MoE: inductor, aot_eager, eager")
    parser.add_argument("--out", type=Path, default=RESULTS / "capacity.json")
    parser.add_argument("--plot", type=Path, help="also write a PNG (needs the bench extra)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measured(way: str, factor: str, asked: argparse.Namespace) -> Cell:
    """A cell, from a process of its own."""
    sizes = [f"--{name}={getattr(asked, name)}" for name in ("tokens", "hidden", "width", "experts", "repeats", "rest")]
    command = [sys.executable, str(Path(__file__).resolve()), "--child", way, "--factors", factor, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{way} at factor {factor} failed with exit code {done.returncode}:\n{done.stderr}")
    return Cell(**json.loads(done.stdout.splitlines()[-1]))


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Time and memory over the capacity factor."""
    figure, axes = panels(2, 5.2, 4.2)
    for axis, name, unit in ((axes[0], "ms", "ms a call"), (axes[1], "extra_mb", "MB a call adds")):
        for way in WAYS:
            points = [(c.factor, getattr(c, name)) for c in cells if c.way == way]
            axis.plot(*zip(*points, strict=True), marker="o", label=way, linewidth=2.5 if way == "moec" else 1)
        axis.set(xlabel="capacity factor", ylabel=unit, xscale="log")
        axis.legend(fontsize=7)
    masks = [(c.factor, c.mask_mb) for c in cells if c.way == "moec"]
    axes[1].plot(*zip(*masks, strict=True), "k--", label="one [T, E, C] tensor")
    axes[1].legend(fontsize=7)
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write JSON and the plot."""
    asked = parse(arguments)
    if asked.child:
        print(json.dumps(asdict(child(asked.child, float(asked.factors), asked))))
        return
    console = Console()
    console.print(environment_line(), highlight=False)
    cells = [measured(way, factor, asked) for factor in asked.factors.split(",") for way in WAYS]
    sizes = f"T={asked.tokens} H={asked.hidden} F={asked.width} E={asked.experts} k=2, f32"
    table = plain_table(f"{sizes}: by capacity factor")
    for name in ("factor", "C", "", "ms", "a call adds, MB", "one [T, E, C], MB", "empty tokens"):
        table.add_column(name, justify="right" if name else "left")
    for c in cells:
        numbers = (f"{c.ms:.1f}", f"{c.extra_mb:.1f}", f"{c.mask_mb:.1f}", str(c.dropped))
        table.add_row(f"{c.factor:g}", str(c.capacity), c.way, *numbers)
    console.print(table)
    path = write_json("capacity", {"sizes": sizes, "cells": [asdict(c) for c in cells]}, asked.out)
    console.print(f"wrote {path}", highlight=False)
    if asked.plot:
        draw(cells, asked.plot)


if __name__ == "__main__":
    main()
