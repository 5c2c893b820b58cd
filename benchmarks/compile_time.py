"""How compile time grows with experts and layers: stacked weights, separate parameters, and a whole deep model.

    python benchmarks/compile_time.py                     # all three parts, five minutes
    python benchmarks/compile_time.py --parts stacked,separate
    python benchmarks/compile_time.py --parts deep --layers 4 --experts 8

Each figure is the median, over rounds in one process, of the time from torch.compile's first call to its result: caches
of Dynamo cleared, kernels' cache warm after a first round that is not counted (a user pays for a kernel's build once a
machine, for tracing in every process).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, Shape, check_names, library_block, plain_layer, write_json
from rich.console import Console
from torch import Tensor, nn

from moec.compare.view import plain_table

PARTS = ("stacked", "separate", "deep")


@dataclass(frozen=True)
class Compile:
    """One compile: seconds, or why there is no figure."""

    what: str
    backend: str
    experts: int
    layers: int
    parameters: int
    rounds: tuple[float, ...] = ()
    note: str = ""

    @property
    def seconds(self) -> float | None:
        """The median of the rounds."""
        return statistics.median(self.rounds) if self.rounds else None


class Expert(nn.Module):
    """One gated expert with parameters of its own."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] → [T, H]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class SeparateMoE(nn.Module):
    """A layer whose experts are a ModuleList."""

    def __init__(self, hidden: int, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, width) for _ in range(experts))
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] → [T, H]."""
        scores = F.softmax(self.gate(x), dim=-1, dtype=torch.float)
        weights, chosen = torch.topk(scores, self.top_k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        mask = F.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        for i, expert in enumerate(self.experts):
            slot, token = torch.where(mask[i])
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class Deep(nn.Module):
    """Layers of norm, MoE and residual: a transformer without attention."""

    def __init__(self, shape: Shape, layers: int, implementation: str) -> None:
        super().__init__()
        blocks = (library_block(shape, implementation, plain_layer(shape, torch.float32)) for _ in range(layers))
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.RMSNorm(shape.hidden) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H] → [B, S, H]."""
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return x


def stacked(experts: int, layers: int) -> tuple[nn.Module, Tensor]:
    """A rolled layer with stacked weights."""
    return plain_layer(Shape(64, 32, experts, 2), torch.float32), torch.randn(13, 64)


def separate(experts: int, layers: int) -> tuple[nn.Module, Tensor]:
    """A layer with 3 E parameters."""
    return SeparateMoE(64, 32, experts, 2).requires_grad_(False), torch.randn(13, 64)


def deep_eager(experts: int, layers: int) -> tuple[nn.Module, Tensor]:
    """A deep model on the library's blocks, as loops."""
    return Deep(Shape(32, 16, experts, 2), layers, "eager").requires_grad_(False), torch.randn(1, 13, 32)


def deep_grouped(experts: int, layers: int) -> tuple[nn.Module, Tensor]:
    """The same on grouped matrix products."""
    return Deep(Shape(32, 16, experts, 2), layers, "grouped_mm").requires_grad_(False), torch.randn(1, 13, 32)


MODELS = {
    "stacked": stacked,
    "ModuleList": separate,
    "deep, eager": deep_eager,
    "deep, grouped_mm": deep_grouped,
}


def child(what: str, backend: str, experts: int, layers: int, rounds: int) -> None:
    """In a process of its own: seconds of the first call of fresh compiles, the warming one first."""
    torch.manual_seed(0)
    model, x = MODELS[what](experts, layers)
    parameters = len(list(model.parameters()))
    with torch.no_grad():
        for _ in range(1 + rounds):
            torch._dynamo.reset()
            start = time.perf_counter()
            torch.compile(model, backend=backend)(x)
            # Each figure as soon as it is known: a later round may run out of time.
            print(json.dumps({"seconds": time.perf_counter() - start, "parameters": parameters}), flush=True)


def record(what: str, backend: str, experts: int, layers: int, rounds: int, budget: float) -> Compile:
    """One model compiled by one backend; the first round counts only where there is no time for another."""
    sizes = ["--experts", str(experts), "--layers", str(layers), "--rounds", str(rounds)]
    command = [sys.executable, str(Path(__file__).resolve()), "--child", what, "--backend", backend, *sizes]
    note = ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=budget, check=False)
        out = done.stdout
        if done.returncode != 0:
            note = f"fails: {(done.stderr.strip().splitlines() or ['no message'])[-1][:100]}"
    except subprocess.TimeoutExpired as error:
        out = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        note = f"> {budget:.0f} s (stopped)"
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if not lines:
        return Compile(what, backend, experts, layers, 0, note=note)
    seconds = [line["seconds"] for line in lines]
    note = note or "cold" * (len(lines) == 1)
    return Compile(what, backend, experts, layers, lines[0]["parameters"], tuple(seconds[1:] or seconds), note)


def measure(asked: argparse.Namespace, say: Callable[[Compile], None]) -> list[Compile]:
    """All parts asked for."""
    parts = asked.parts.split(",")
    runs = [("stacked", "moec", n, 1) for n in asked.stacked if "stacked" in parts]
    runs += [("ModuleList", "moec", n, 1) for n in asked.separate if "separate" in parts]
    if "deep" in parts:
        runs.append(("deep, eager", "moec", asked.experts, asked.layers))
        runs.append(("deep, grouped_mm", "inductor", asked.experts, asked.layers))
    found: list[Compile] = []
    for run in runs:
        rounds = asked.rounds if run[3] == 1 else max(1, asked.rounds // 3)
        found.append(record(*run, rounds, asked.budget))
        say(found[-1])
    return found


def table_row(one: Compile, least: Compile) -> tuple[str, ...]:
    """Cells of one line of the table; `least` is the smallest of the same model, that growth is counted from."""
    model = one.what if one.layers == 1 else f"{one.layers} {one.what}"
    name = (model, one.backend, str(one.experts), str(one.parameters))
    if one.seconds is None or least.seconds is None:
        return (*name, "–", "–", "–", one.note)
    added = one.parameters - least.parameters
    growth = f"{1e3 * (one.seconds - least.seconds) / added:.1f}" if added else "–"
    seconds = f"{one.seconds:.2f} ({min(one.rounds):.2f}–{max(one.rounds):.2f})"
    return (*name, seconds, f"{one.seconds / least.seconds:.2f}", growth, one.note)


def show(found: Sequence[Compile], console: Console) -> None:
    """The table; a deep model's rows are compared with moec's, the others' with the fewest experts'."""
    table = plain_table("seconds to the first result of a fresh compile")
    for name in ("model", "backend", "E", "params", "s (range)", "×", "ms/param", ""):
        table.add_column(name, justify="left" if name in ("model", "backend", "") else "right", no_wrap=name != "")
    for one in found:
        least = next(each for each in found if each.what == one.what or min(each.layers, one.layers) > 1)
        table.add_row(*table_row(one, least))
    console.print(table)
    console.print("×: of the first row of its model; ms/param: for each parameter more than there", style="dim")


def numbers(text: str) -> list[int]:
    """`8,32` → [8, 32]."""
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--stacked", type=numbers, default=[8, 32, 128, 512], help="expert counts")
    parser.add_argument("--separate", type=numbers, default=[8, 32, 128], help="expert counts")
    parser.add_argument("--layers", type=int, default=48, help="layers of the deep model")
    parser.add_argument("--experts", type=int, default=128, help="experts of the deep model")
    parser.add_argument(
        "--rounds", type=int, default=5, help="compiles a figure is the median of; a third of it where deep"
    )
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which a compile is stopped")
    parser.add_argument("--out", type=Path, default=RESULTS / "compile_time.json")
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="moec", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.child:
        child(asked.child, asked.backend, asked.experts, asked.layers, asked.rounds)
        return
    check_names(parser, asked, parts=PARTS)
    say = Console(stderr=True, highlight=False)
    if asked.rounds < 1:
        parser.error(f"--rounds {asked.rounds} is too few; expected 1 or more")
    found = measure(
        asked,
        lambda one: say.log(f"{one.what}, E={one.experts}, {one.backend}: {one.seconds or math.nan:.2f} s {one.note}"),
    )
    show(found, Console())
    write_json("compile_time", {"compiles": [asdict(one) | {"seconds": one.seconds} for one in found]}, asked.out)


if __name__ == "__main__":
    main()
