"""This machine's ceilings: reading memory and matrix products by dtype, and the limits of a layer that follow.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --layers A --dtypes f32 --plot roofline.png

The limit of a layer is max(arithmetic / GEMM peak, weights of the experts hit / read bandwidth). Below the token count
where both are equal a layer waits for memory, above it for arithmetic.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from common import LAYERS, RESULTS, Shape, check_names, panels, save_figure, write_json
from rich import box
from rich.console import Console
from rich.table import Table

from moec.compare.measure import Ceilings, Layer, environment_line, measure_ceilings
from moec.ir.dtypes import DTYPES

TOKENS = (1, 8, 64, 512, 2048)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="A,B", help=f"of {LAYERS}")
    parser.add_argument("--dtypes", default="f32,bf16,f16", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--megabytes", type=int, default=512, help="read to measure the bandwidth")
    parser.add_argument("--size", type=int, default=2048, help="of the square matrices")
    parser.add_argument("--repeats", type=int, default=3, help="measurements; the table has the best, and their spread")
    parser.add_argument("--out", type=Path, default=RESULTS / "roofline.json")
    parser.add_argument("--plot", type=Path, help="also write a PNG (needs the bench extra)")
    asked = parser.parse_args(arguments)
    check_names(parser, asked, layers=LAYERS, dtypes=DTYPES)
    for name in ("megabytes", "size", "repeats"):
        if getattr(asked, name) < 1:
            parser.error(f"--{name} {getattr(asked, name)} is too small; expected 1 or more")
    return asked


def best(found: Sequence[Ceilings]) -> Ceilings:
    """The highest of each: a neighbour's load only ever lowers them."""
    return Ceilings(max(c.read for c in found), max(c.gemm for c in found), max(c.native for c in found))


def spread(values: Sequence[float]) -> float:
    """(largest − smallest) / largest."""
    return (max(values) - min(values)) / max(values)


def expected_hits(shape: Shape, tokens: int) -> int:
    """Distinct experts that evenly routed tokens hit on average: E · (1 − (1 − k/E)^T)."""
    return round(shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens))


def limits(shape: Shape, layer: Layer, ceilings: Ceilings) -> dict[int, dict[str, float | str]]:
    """By token count: the least time in ms, what bounds it, and the rate that it means."""
    found: dict[int, dict[str, float | str]] = {}
    for tokens in TOKENS:
        active = max(expected_hits(shape, tokens), shape.top_k)
        limit = layer.limit_ms(tokens, active, ceilings)
        memory = 1e3 * layer.bytes_read(active) / (ceilings.read * 1e9)
        bound = "memory" if memory >= limit else "arithmetic"
        found[tokens] = {"ms": limit, "bound": bound, "gflops": layer.flops(tokens) / limit / 1e6, "active": active}
    return found


def ceilings_table(found: Mapping[str, Sequence[Ceilings]]) -> Table:
    """One row a dtype."""
    table = Table(title="ceilings of this machine", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("dtype", "read GB/s", "spread", "GEMM GFLOP/s", "its own products GFLOP/s", "spread "):
        table.add_column(name, justify="left" if name == "dtype" else "right")
    for dtype, each in found.items():
        top = best(each)
        reads, rates = [c.read for c in each], [c.native for c in each]
        table.add_row(
            dtype,
            f"{top.read:.1f}",
            f"{100 * spread(reads):.0f} %",
            f"{top.gemm:.1f}",
            f"{top.native:.1f}",
            f"{100 * spread(rates):.0f} %",
        )
    return table


def limits_table(title: str, found: Mapping[int, Mapping[str, float | str]]) -> Table:
    """One row a token count."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("tokens", "experts hit", "limit ms", "bound by", "GFLOP/s there"):
        table.add_column(name, justify="left" if name == "bound by" else "right")
    for tokens, row in found.items():
        ms, rate = float(row["ms"]), float(row["gflops"])
        table.add_row(str(tokens), str(row["active"]), f"{ms:.3f}", str(row["bound"]), f"{rate:.1f}")
    return table


def plot(tables: Mapping[str, Mapping[int, Mapping[str, float | str]]], path: Path) -> None:
    """Least time a layer over tokens."""
    figure, (axis,) = panels(1, 6.4, 4.4)
    for title, rows in tables.items():
        axis.plot(list(rows), [float(row["ms"]) for row in rows.values()], marker="o", label=title)
    axis.set(xlabel="tokens", ylabel="least ms a layer", xscale="log", yscale="log")
    axis.legend(fontsize=8)
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON and the plot."""
    asked = parse(arguments)
    console, say = Console(), Console(stderr=True, highlight=False)
    console.print(environment_line(), highlight=False)
    found: dict[str, list[Ceilings]] = {dtype: [] for dtype in asked.dtypes.split(",")}
    for _ in range(asked.repeats):  # in turns, so that a neighbour's load falls on all alike
        for dtype, each in found.items():
            each.append(measure_ceilings(DTYPES[dtype], asked.megabytes << 20, asked.size))
    console.print(ceilings_table(found))
    tables: dict[str, dict[int, dict[str, float | str]]] = {}
    for dtype, each in found.items():
        for name in asked.layers.split(","):
            shape = LAYERS[name]
            title = f"{name} {dtype}: {shape}"
            tables[title] = limits(shape, shape.layer(DTYPES[dtype]), best(each))
            console.print(limits_table(title, tables[title]))
    ceilings = {dtype: {"best": asdict(best(each)), "all": [asdict(c) for c in each]} for dtype, each in found.items()}
    say.print(f"wrote {write_json('roofline', {'ceilings': ceilings, 'limits': tables}, asked.out)}")
    if asked.plot:
        plot(tables, asked.plot)
        say.print(f"wrote {asked.plot}")


if __name__ == "__main__":
    main()
