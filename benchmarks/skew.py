"""Skewed routing: the experts' kernels where experts have very different numbers of rows, and threads that wait.

    python benchmarks/skew.py                                    # layers A and B, fp32 and bf16, forward and backward
    python benchmarks/skew.py --layers tiny --tokens 64 --repeats 3

Routings with the same T·k active rows: `uniform`, `zipf` (a choice's expert drawn with probability 1/rank^1.2, k
distinct ones a token) and `one` (every token to the same k experts). Each is compared with the twin in fp32 first,
then all are timed in turns. Throughput is uniform's time over a routing's; `idle` is the share of the forward's time
that the thread which waits most spends waiting for others.
"""

from __future__ import annotations

import argparse
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from common import LAYERS, RESULTS, Shape, check_names, write_json
from rich.console import Console
from torch import Tensor

from moec.codegen import twin
from moec.compare.measure import Timing, environment_line, interleaved
from moec.compare.view import plain_table
from moec.demo.check import TOLERANCE, relative_error
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.runtime.backward import load_backward
from moec.runtime.cpu import Kernel, load_kernel
from moec.runtime.gradients import GradientMemory

EXPONENT = 1.2
ROUTINGS = ("uniform", "zipf", "one")


@dataclass(frozen=True)
class Skewed:
    """One routing of one layer: experts hit, rows of the fullest, times in ms, throughput as a share of uniform's.

    idle: of the thread that waits most, a share of the forward's time; 0 on one thread.
    """

    layer: str
    dtype: str
    tokens: int
    routing: str
    hit: int
    fullest: int
    forward: Timing
    backward: Timing
    forward_share: float
    backward_share: float
    idle: float


def chosen(routing: str, shape: Shape, tokens: int) -> Tensor:
    """i64[T, k], distinct experts in each row, the same in every run."""
    made = torch.Generator().manual_seed(3)
    if routing == "one":
        return torch.arange(shape.top_k).expand(tokens, shape.top_k).contiguous()
    power = EXPONENT if routing == "zipf" else 0.0
    chances = torch.arange(1, shape.experts + 1).double().pow(-power)
    return torch.multinomial(chances.expand(tokens, -1), shape.top_k, generator=made)


@dataclass(frozen=True)
class Operands:
    """A layer's tensors: x and y's gradient [T, H], routing weights [T, k], both weight tensors."""

    x: Tensor
    grad: Tensor
    weights: Tensor
    params: tuple[Tensor, Tensor]

    @staticmethod
    def make(shape: Shape, dtype: torch.dtype, tokens: int) -> Operands:
        """Random ones, seeded."""
        torch.manual_seed(0)
        up = (torch.randn(shape.experts, 2 * shape.width, shape.hidden) * 0.02).to(dtype)
        down = (torch.randn(shape.experts, shape.hidden, shape.width) * 0.02).to(dtype)
        x, grad = (torch.randn(tokens, shape.hidden).to(dtype) for _ in range(2))
        return Operands(x, grad, torch.rand(tokens, shape.top_k), (up, down))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="A,B", help=f"of {LAYERS}")
    parser.add_argument("--tokens", default="64,512")
    parser.add_argument("--dtypes", default="f32,bf16", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--repeats", type=int, default=9, help="calls a routing, at most")
    parser.add_argument("--seconds", type=float, default=30.0, help="seconds to time one layer and token count")
    parser.add_argument("--no-backward", action="store_true", help="time the forward only")
    parser.add_argument("--out", type=Path, default=RESULTS / "skew.json")
    asked = parser.parse_args(arguments)
    check_names(parser, asked, layers=LAYERS, dtypes=DTYPES)
    return asked


def forward(kernel: Kernel, o: Operands, experts: Tensor) -> Tensor:
    """y [T, H]."""
    return kernel.experts(o.x, o.weights, experts, o.params)


def check(spec: KernelSpec, kernel: Kernel, o: Operands, experts: Tensor) -> None:
    """Raises RuntimeError where the kernel's y is not the twin's in fp32 on at most 64 tokens."""
    few = Operands(o.x[:64], o.grad[:64], o.weights[:64], o.params)
    plain = KernelSpec(ExpertsSpec())
    wide = [p.float() for p in o.params]
    want = twin.experts(few.x.float(), few.weights, experts[:64], wide, plain)
    error = relative_error(forward(kernel, few, experts[:64]), want)
    if not error <= TOLERANCE[o.x.dtype]:
        raise RuntimeError(f"{spec}: relative error {error:.1e}, allowed {TOLERANCE[o.x.dtype]:.0e}")


def idle(kernel: Kernel, o: Operands, experts: Tensor, repeats: int) -> float:
    """The least of several calls: a neighbour's load is no fault of the work split."""
    waits = array("q", [0] * torch.get_num_threads())
    watched = kernel.watched(waits)
    forward(watched, o, experts)
    shares: list[float] = []
    for _ in range(repeats):
        waits[:] = array("q", [0] * len(waits))
        start = perf_counter()
        forward(watched, o, experts)
        shares.append(1e-9 * max(waits) / (perf_counter() - start))
    return min(shares)


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = perf_counter()
    call()
    return perf_counter() - start


def measure(name: str, dtype: str, tokens: int, asked: argparse.Namespace) -> list[Skewed]:
    """All routings of one layer, in turns."""
    shape, o = LAYERS[name], Operands.make(LAYERS[name], DTYPES[dtype], tokens)
    spec = KernelSpec(ExpertsSpec(dtype), y_dtype=dtype)
    kernel, gradients, memory = load_kernel(str(spec), None), load_backward(str(spec)), GradientMemory()
    routes = {routing: chosen(routing, shape, tokens) for routing in ROUTINGS}
    calls: dict[str, Callable[[], float]] = {}
    for routing, experts in routes.items():
        check(spec, kernel, o, experts)
        calls[f"forward {routing}"] = partial(seconds, partial(forward, kernel, o, experts))
        back = partial(gradients, o.grad, o.x, o.weights, experts, o.params, None, [True] * 4, memory.take)
        if not asked.no_backward:
            calls[f"backward {routing}"] = partial(seconds, back)
    for call in calls.values():
        call()
    times = interleaved(calls, asked.repeats, asked.seconds)
    return [
        row(name, dtype, tokens, routing, experts, times, idle(kernel, o, experts, asked.repeats))
        for routing, experts in routes.items()
    ]


def row(
    name: str, dtype: str, tokens: int, routing: str, experts: Tensor, times: Mapping[str, Timing], idle: float
) -> Skewed:
    """The figures of one routing."""
    counts = torch.bincount(experts.flatten())
    ways = ("forward", "backward") if "backward uniform" in times else ("forward", "forward")
    forward, backward = (times[f"{way} {routing}"] for way in ways)
    return Skewed(
        layer=name,
        dtype=dtype,
        tokens=tokens,
        routing=routing,
        hit=int((counts > 0).sum()),
        fullest=int(counts.max()),
        forward=forward,
        backward=backward,
        forward_share=times["forward uniform"].low / forward.low,
        backward_share=times[f"{ways[1]} uniform"].low / backward.low,
        idle=idle,
    )


def show(console: Console, title: str, rows: Sequence[Skewed]) -> None:
    """One line a routing."""
    table = plain_table(title)
    heads = ("routing", "experts hit", "most rows", "forward ms", "× uniform", "backward ms", "× uniform", "idle")
    for head in heads:
        table.add_column(head, justify="left" if head == "routing" else "right")
    for r in rows:
        times = (
            f"{r.forward.median:.2f}",
            f"{r.forward_share:.2f}",
            f"{r.backward.median:.2f}",
            f"{r.backward_share:.2f}",
        )
        table.add_row(r.routing, str(r.hit), str(r.fullest), *times, f"{100 * r.idle:.0f} %")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    asked = parse(arguments)
    console, say = Console(), Console(stderr=True, highlight=False)
    console.print(environment_line(), highlight=False)
    found: list[Skewed] = []
    with torch.no_grad():
        for dtype in asked.dtypes.split(","):
            for name in asked.layers.split(","):
                for tokens in map(int, asked.tokens.split(",")):
                    rows = measure(name, dtype, tokens, asked)
                    show(console, f"{name} {dtype}, {tokens} tokens, {tokens * LAYERS[name].top_k} rows", rows)
                    found += rows
    say.print(f"wrote {write_json('skew', {'rows': [asdict(r) for r in found]}, asked.out)}")


if __name__ == "__main__":
    main()
