"""One MoE layer on a GPU: moec beside the library's expert implementations, forward and training, in one run.

    python benchmarks/gpu.py                           # Mixtral-8x7B's, Qwen3-30B-A3B's and DeepSeek-V3's layer
    python benchmarks/gpu.py --layers mixtral --tokens 1,64 --train
    python benchmarks/gpu.py --schedules --profile               # other schedules too; moec's time by kernel

Every way is compared with an fp32 reference before it is timed. `ms` is the GPU's own time of a call that is
recorded as a CUDA graph and replayed with a cold L2 cache, the median of five times up to 40 calls; `*` marks
ways that cannot be recorded, because they wait for the device: their calls are timed as they are. `host` is the
time of a call without a graph, in a row of calls. The limit is max(arithmetic / rate of an 8192³ product, bytes
of the experts hit / bytes a second that a copy reads and writes), both measured in the run; of a training step
three times that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Shape, add_ways, asked_for, check_names, library_block, wanted, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moec.compare.measure import Ceilings
from moec.demo.forms import Experts, MoE
from moec.ir.dtypes import DTYPES
from moec.tune.gpu import EventClock

GPU_LAYERS: Mapping[str, Shape] = {
    "mixtral": Shape(4096, 14336, 8, 2),
    "qwen3": Shape(2048, 768, 128, 8),
    "deepseek": Shape(7168, 2048, 256, 8),
    "tiny": Shape(128, 64, 8, 2),
}
MOEC = "moec"
WAITING = ("eager",)  # reads from the device which experts are hit
REPEATS = 5  # each records the call anew
MOST_GATHERED = 128  # pairs of which a copy of all weights each still fits


@dataclass(frozen=True)
class Cell:
    """One way at one number of tokens: ms on the GPU, whether from a graph, ms a call as seen by the host, peak MiB."""

    layer: str
    dtype: str
    tokens: int
    way: str
    training: bool
    milliseconds: float
    recorded: bool
    host: float
    extra: float
    error: str = ""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="mixtral,qwen3,deepseek", help=f"of {', '.join(GPU_LAYERS)}")
    parser.add_argument("--tokens", default="1,16,64,512,4096")
    parser.add_argument("--dtypes", default="bf16", help=f"of {', '.join(DTYPES)}")
    add_ways(parser)
    parser.add_argument("--train", action="store_true", help="forward and backward instead of forward")
    parser.add_argument("--schedules", action="store_true", help="moec with each of its schedules")
    parser.add_argument("--no-inductor", action="store_true", help="leave Inductor's compilation out")
    parser.add_argument("--profile", action="store_true", help="also moec's time by kernel")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    asked = parser.parse_args(arguments)
    check_names(parser, asked, layers=GPU_LAYERS, dtypes=DTYPES)
    return asked


def ceilings(dtype: torch.dtype, clock: EventClock) -> Ceilings:
    """What this GPU reaches: GB/s that a copy reads and writes, GFLOP/s of a large product."""
    source = torch.empty(2 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copied = clock.seconds(lambda: target.copy_(source), lambda _: None)
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    b = torch.randn_like(a)
    product = clock.seconds(lambda: torch.mm(a, b), lambda _: None)
    rate = 2 * 8192**3 / product / 1e9
    return Ceilings(2 * source.numel() / copied / 1e9, rate, rate)


def gpu_layer(shape: Shape, dtype: torch.dtype) -> MoE:
    """The parameters, in the demo's plain module."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        experts = Experts(1, 1, 1, dtype)
        sizes = {"gate_up": (2 * shape.width, shape.hidden), "down": (shape.hidden, shape.width)}
        experts.num_experts = shape.experts
        for name, (rows, columns) in sizes.items():
            made = torch.empty(shape.experts, rows, columns, dtype=dtype).normal_(0, 0.02)
            setattr(experts, name, nn.Parameter(made, requires_grad=False))
        gate = nn.Linear(shape.hidden, shape.experts, bias=False, dtype=dtype).requires_grad_(False)
    return MoE(experts, gate, shape.top_k)


def ways(plain: MoE, shape: Shape, asked: argparse.Namespace) -> dict[str, Callable[[Tensor], Tensor]]:
    """moec first. Each takes x [T, H]."""

    def block(implementation: str, backend: str = "", **options: Any) -> Callable[[Tensor], Tensor]:
        made = library_block(shape, implementation, plain)
        made = torch.compile(made, backend=backend, options=options or None) if backend else made
        return lambda x: made(x[None])[0]

    found = {MOEC: block("grouped_mm", "moec")}
    if asked.schedules:
        for schedule in ("descriptors", "persistent", "specialized"):
            found[f"{MOEC}, {schedule}"] = block("grouped_mm", "moec", schedule=schedule)
        return found
    found["grouped_mm"] = block("grouped_mm")
    if not asked.no_inductor:
        found["Inductor, grouped_mm"] = block("grouped_mm", "inductor")
    return found | {"batched_mm": block("batched_mm"), "eager": block("eager")}


def step(way: Callable[[Tensor], Tensor], x: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Forward and backward: the gradients of x and of all parameters."""
    y = way(x)
    return list(torch.autograd.grad(y, [x, *params], torch.ones_like(y)))


def measure(call: Callable[[], object], clock: EventClock, record: bool) -> tuple[float, bool, float]:
    """ms on the GPU, whether from a graph, ms a call in a row of calls."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start, count = time.perf_counter(), 10
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    host = 1e3 * (time.perf_counter() - start) / count
    clocked = clock.seconds if record else clock.unrecorded
    return 1e3 * statistics.median(clocked(call, lambda _: None) for _ in range(REPEATS)), record, host


def one(name: str, dtype: str, tokens: int, plain: MoE, way: tuple[str, Callable[[Tensor], Tensor]],
        asked: argparse.Namespace, clock: EventClock) -> Cell:  # fmt: skip
    """One cell; what fails says so in it."""
    torch.manual_seed(1)
    x = torch.randn(tokens, plain.gate.in_features, device="cuda", dtype=DTYPES[dtype])
    title, call = way
    try:
        with torch.set_grad_enabled(asked.train):
            few = x[:64]
            verdict = wanted(plain, few.detach()).verdict(call(few).detach())
            if verdict:
                return Cell(name, dtype, tokens, title, asked.train, 0, False, 0, 0, verdict)
            params = [p for p in plain.parameters() if p.requires_grad]
            timed = (lambda: step(call, x.requires_grad_(), params)) if asked.train else (lambda: call(x))
            timed()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            timed()
            extra = (torch.cuda.max_memory_allocated() - before) / 2**20
            ms, recorded, host = measure(timed, clock, not asked.train and title not in WAITING)
        return Cell(name, dtype, tokens, title, asked.train, ms, recorded, host, extra)
    except Exception as error:  # a way of others may be refused by the library, or run out of memory
        torch.cuda.empty_cache()
        text = " ".join(str(error).split())[:160]
        return Cell(name, dtype, tokens, title, asked.train, 0, False, 0, 0, f"{type(error).__name__}: {text}")


def by_kernel(call: Callable[[], object], calls: int = 10) -> dict[str, float]:
    """µs a call in each kernel, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    spent = {e.key: e.self_device_time_total / calls for e in trace.key_averages() if e.self_device_time_total}
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def show_kernels(
    call: Callable[[Tensor], Tensor], x: Tensor, plain: MoE, training: bool, console: Console, most: int = 9
) -> None:
    """The kernels that take longest."""
    params = [p for p in plain.parameters() if p.requires_grad]
    with torch.set_grad_enabled(training):
        spent = by_kernel(lambda: step(call, x.requires_grad_(), params) if training else call(x))
    for kernel, micros in list(spent.items())[:most]:
        console.print(f"    {micros:9.1f} µs  {kernel[:90]}", highlight=False, markup=False)


def table(title: str, rows: Mapping[int, tuple[float, list[Cell]]], training: bool) -> Table:
    """A row for each number of tokens, a column for each way."""
    names = list(dict.fromkeys(cell.way for _, cells in rows.values() for cell in cells))
    made = Table("T", "limit", *names, title=title, title_justify="left")
    for tokens, (limit, cells) in rows.items():
        own = next((c.milliseconds for c in cells if c.way == MOEC), 0.0)
        texts = {}
        for cell in cells:
            ratio = "" if cell.way == MOEC or not own else f" {cell.milliseconds / own:.2f}×"
            mark = "" if cell.recorded or training else "*"
            extra = f", {cell.extra:.0f} MiB" if training else f", host {cell.host:.3f}"
            texts[cell.way] = cell.error[:24] or f"{cell.milliseconds:.3f}{mark}{ratio}{extra}"
        made.add_row(str(tokens), f"{limit:.3f}", *(texts.get(name, "–") for name in names))
    return made


def run_layer(name: str, dtype: str, asked: argparse.Namespace, clock: EventClock, console: Console) -> list[Cell]:
    """All cells of a layer, and its table."""
    shape, most = GPU_LAYERS[name], ceilings(DTYPES[dtype], clock)
    plain = gpu_layer(shape, DTYPES[dtype])
    plain.requires_grad_(asked.train)
    layer, cells, rows = shape.layer(DTYPES[dtype]), list[Cell](), dict[int, tuple[float, list[Cell]]]()
    found = ways(plain, shape, asked)
    found = {name: found[name] for name in asked_for(asked.ways, list(found))}
    for tokens in map(int, asked.tokens.split(",")):
        torch.manual_seed(1)
        x = torch.randn(tokens, shape.hidden, device="cuda", dtype=DTYPES[dtype])
        active = int(plain.gate(x).topk(shape.top_k).indices.unique().numel())
        limit = layer.limit_ms(tokens, active, most) * (3 if asked.train else 1)
        here: list[Cell] = []
        for way in found.items():
            if way[0] == "batched_mm" and (tokens * shape.top_k > MOST_GATHERED or asked.train):
                continue
            here.append(one(name, dtype, tokens, plain, way, asked, clock))
            console.print(json.dumps(asdict(here[-1])), style="dim", soft_wrap=True, highlight=False)
            if asked.profile and not here[-1].error and way[0] != "eager":
                show_kernels(way[1], x, plain, asked.train, console)
        rows[tokens] = (limit, here)
        cells += here
    rate = f"{most.gemm / 1e3:.0f} TFLOP/s, {most.read / 1e3:.2f} TB/s"
    kind = "training step" if asked.train else "forward"
    console.print(table(f"{name} {dtype}, {kind}: {shape}; {rate}; ms", rows, asked.train))
    return cells


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    asked, console = parse(arguments), Console(width=200)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: torch sees no GPU; benchmarks/layer.py measures on the CPU")
    console.print(f"{torch.cuda.get_device_name()} · torch {torch.__version__}")
    clock, cells = EventClock(torch.device("cuda", torch.cuda.current_device())), list[Cell]()
    for dtype in asked.dtypes.split(","):
        for name in asked.layers.split(","):
            cells += run_layer(name, dtype, asked, clock, console)
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    data = {"device": torch.cuda.get_device_name(), "cells": [asdict(cell) for cell in cells]}
    console.print(f"wrote {write_json('gpu', data, asked.out)}")


if __name__ == "__main__":
    main()
