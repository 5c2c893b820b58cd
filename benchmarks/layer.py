"""One MoE layer, forward: moec beside the library's three expert implementations, plain and under Inductor, in one run.

    python benchmarks/layer.py                                   # all layers, dtypes and token counts
    python benchmarks/layer.py --quick                           # layer A, bf16, few alternatives
    python benchmarks/layer.py --layers A --tokens 1,8 --dtypes f32

Every way is checked against an fp32 reference before it is timed. Ways are timed in turns; a cell is the median of its
calls. The limit is max(arithmetic / GEMM peak, weights of the experts hit / read bandwidth), both measured in the run.
What moec takes outside its kernels is measured on a layer so small that its arithmetic is nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from time import thread_time

import torch
from common import (
    LAYERS,
    Shape,
    add_race,
    check_names,
    layer_inputs,
    library_block,
    plain_layer,
    race_layers,
    wanted,
    write_race,
)
from rich.console import Console

from moec.compare.measure import environment_line
from moec.compare.ways import MOEC, Way
from moec.compare.worker import Built
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cost = {"repeats": 15, "budget": 60.0, "seconds": 20.0, "patience": 8.0}
    add_race(parser, "layer", tokens="1,8,64,512", dtypes="bf16,f32", **cost)
    parser.add_argument("--no-inductor", action="store_true", help="leave Inductor's compilations out")
    parser.add_argument("--on-grouped", action="store_true", help="also moec on the grouped_mm form")
    parser.add_argument("--quick", action="store_true", help="layer A, bf16, 1 and 64 tokens, short budgets")
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.layers, asked.tokens, asked.dtypes = "A", "1,64", "bf16"
        asked.budget, asked.seconds, asked.repeats = 20.0, 5.0, 9
    check_names(parser, asked, layers=LAYERS, dtypes=DTYPES)
    return asked


def build(shape: Shape, dtype: str, tokens: tuple[int, ...], implementation: str, backend: str) -> Built:
    """One way, in its own process; backend '': eager."""
    plain, inputs = plain_layer(shape, DTYPES[dtype]), layer_inputs(shape, DTYPES[dtype], tokens)
    block = library_block(shape, implementation, plain)
    call = torch.compile(block, backend=backend) if backend else block
    # As blocks take it: [batch, sequence, hidden].
    return Built(lambda x: call(x[None]), inputs, lambda t, y: wanted(plain, inputs[t]).verdict(y))


def ways(shape: Shape, dtype: str, tokens: tuple[int, ...], inductor: bool, on_grouped: bool) -> list[Way]:
    """moec on the library's eager form, then every alternative, cheapest to prepare first."""

    def way(name: str, implementation: str, backend: str) -> Way:
        return Way(
            name, build, (shape, dtype, tokens, implementation, backend), bool(backend), implementation == "batched_mm"
        )

    found = [way(MOEC, "eager", "moec")]
    if on_grouped:
        found.append(way(f"{MOEC} (on grouped_mm)", "grouped_mm", "moec"))
    found += [way(name, name, "") for name in ("eager", "grouped_mm", "batched_mm")]
    if inductor:
        found += [way(f"Inductor, {name}", name, "inductor") for name in ("grouped_mm", "batched_mm", "eager")]
    return found


@dataclass(frozen=True)
class Outside:
    """Microseconds a layer at T=1 outside kernels: moec's op, with its kernel's own start; all of a compiled call."""

    op: float
    compiled: float


def outside(repeats: int = 50, calls: int = 20) -> Outside:
    """The least mean of a few calls, on the layer `tiny`, in CPU time of one thread."""
    shape, threads = LAYERS["tiny"], torch.get_num_threads()
    plain, x = plain_layer(shape, torch.float32), layer_inputs(shape, torch.float32, (1,))[1]
    spec = str(KernelSpec(ExpertsSpec(), RouterSpec(renormalize=True)))
    params, router = [plain.experts.gate_up, plain.experts.down], [plain.gate.weight]
    compiled = torch.compile(plain, backend="moec", options={"rest": "eager"})

    def least(call: Callable[[], object]) -> float:
        call()
        spent: list[float] = []
        for _ in range(repeats):
            start = thread_time()
            for _ in range(calls):
                call()
            spent.append((thread_time() - start) / calls)
        return 1e6 * min(spent)

    torch.set_num_threads(1)
    try:
        op = least(lambda: torch.ops.moec.moe(x, router, params, shape.top_k, spec, "auto"))
        return Outside(op, least(lambda: compiled(x)))
    finally:
        torch.set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON and the plot."""
    asked = parse(arguments)
    console, say = Console(), Console(stderr=True, highlight=False)
    console.print(environment_line(), highlight=False)
    with torch.no_grad():
        forms = partial(ways, inductor=not asked.no_inductor, on_grouped=asked.on_grouped)
        raced = list(race_layers(asked, forms, console, say))
        bare = outside()
    console.print(
        f"outside kernels, a layer at T=1: moec's op {bare.op:.0f} µs; with Dynamo's guards {bare.compiled:.0f} µs",
        highlight=False,
    )
    write_race("layer", raced, asked, say, {"outside": asdict(bare)})


if __name__ == "__main__":
    main()
