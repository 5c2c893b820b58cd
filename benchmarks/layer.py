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
from pathlib import Path
from time import thread_time

import torch
from common import (
    DTYPES,
    LAYERS,
    RESULTS,
    Shape,
    active_experts,
    add_ways,
    check_names,
    layer_inputs,
    library_block,
    only,
    plain_layer,
    plot_times,
    rows_data,
    show_rows,
    wanted,
    write_json,
)
from rich.console import Console

from moec.compare import MOEC, Budget, Row, Way, race
from moec.compare_view import times_table
from moec.measure import Ceilings, environment_line, measure_ceilings
from moec.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.worker import Built


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="A,B", help=f"of {', '.join(LAYERS)}")
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--dtypes", default="bf16,f32", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--repeats", type=int, default=15, help="calls a cell, at most")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds to prepare one alternative")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds to time one token count")
    parser.add_argument(
        "--patience", type=float, default=2.0, help="skip alternatives whose call is expected to be slower"
    )
    parser.add_argument("--no-inductor", action="store_true", help="leave Inductor's compilations out")
    parser.add_argument("--on-grouped", action="store_true", help="also moec on the grouped_mm form")
    parser.add_argument("--quick", action="store_true", help="layer A, bf16, 1 and 64 tokens, short budgets")
    add_ways(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "layer.json")
    parser.add_argument("--plot", type=Path, help="also write a PNG (needs the bench extra)")
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


def measure(shape: Shape, dtype: str, asked: argparse.Namespace, ceilings: Ceilings, say: Console) -> tuple[Row, ...]:
    """All token counts of one layer and dtype."""
    tokens = tuple(map(int, asked.tokens.split(",")))
    plain = plain_layer(shape, DTYPES[dtype])
    return race(
        only(asked.ways, ways(shape, dtype, tokens, not asked.no_inductor, asked.on_grouped)),
        layer_inputs(shape, DTYPES[dtype], tokens),
        shape.layer(DTYPES[dtype]),
        ceilings,
        lambda x: active_experts(plain, x),
        Budget(asked.patience, asked.budget, asked.seconds, repeats=asked.repeats),
        step=lambda text: say.log(text),
    )


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
    tables: dict[str, tuple[Row, ...]] = {}
    ceilings: dict[str, Ceilings] = {}
    with torch.no_grad():
        for dtype in asked.dtypes.split(","):
            ceilings[dtype] = measure_ceilings(DTYPES[dtype])
            for layer in asked.layers.split(","):
                shape = LAYERS[layer]
                title = f"{layer} {dtype}: {shape}"
                rows = tables[title] = measure(shape, dtype, asked, ceilings[dtype], say)
                names = list(dict.fromkeys(n for row in rows for n in (*row.times, *row.skipped)))
                show_rows(console, times_table(title, rows, names), rows)
        bare = outside()
    console.print(
        f"outside kernels, a layer at T=1: moec's op {bare.op:.0f} µs; with Dynamo's guards {bare.compiled:.0f} µs",
        highlight=False,
    )
    data = rows_data(tables)
    limits = {dtype: asdict(found) for dtype, found in ceilings.items()}
    say.print(f"wrote {write_json('layer', {'ceilings': limits, 'layers': data, 'outside': asdict(bare)}, asked.out)}")
    if asked.plot:
        plot_times(tables, asked.plot)
        say.print(f"wrote {asked.plot}")


if __name__ == "__main__":
    main()
