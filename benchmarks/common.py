"""Shared by the benchmarks: layers, library blocks on shared weights, correctness, where results go."""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moec.compare.measure import Ceilings, Layer, environment_line, measure_ceilings
from moec.compare.view import times_table
from moec.compare.ways import MOEC, Budget, Row, Way, empty_cells, race
from moec.demo.check import TOLERANCE, reference, relative_error
from moec.demo.forms import MoE, make_moe
from moec.ir.dtypes import DTYPES

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer: H hidden, F expert width, E experts, k experts a token."""

    hidden: int
    width: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"H={self.hidden} F={self.width} E={self.experts} k={self.top_k}"

    def layer(self, dtype: torch.dtype) -> Layer:
        """With a dtype, for limits."""
        return Layer(self.hidden, self.width, self.experts, self.top_k, dtype.itemsize)


class Layers(Mapping[str, Shape]):
    """Shapes by name; also every other shape, by its sizes: `2048x1408x60x4` is H, F, E and k."""

    def __init__(self, named: Mapping[str, Shape]) -> None:
        self._named = named

    def __getitem__(self, name: str) -> Shape:
        if name in self._named:
            return self._named[name]
        sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", name)
        shape = Shape(*map(int, sizes.groups())) if sizes else None
        if shape is None or shape.top_k > shape.experts:
            raise KeyError(name)
        return shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def __str__(self) -> str:
        return f"{', '.join(self._named)}, or sizes HxFxExk such as 2048x1408x60x4"


# Many small experts (30B-A3B models) and few large ones (8x7B-like, at half the hidden size).
LAYERS = Layers({"A": Shape(2048, 768, 64, 8), "B": Shape(1024, 3584, 8, 2), "tiny": Shape(64, 32, 8, 2)})


def library_block(shape: Shape, implementation: str, plain: MoE) -> nn.Module:
    """The transformers block of this shape on `plain`'s parameters; implementation: eager, grouped_mm or batched_mm."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(copy.deepcopy(config))
    block.gate.weight = plain.gate.weight
    block.experts.gate_up_proj, block.experts.down_proj = plain.experts.gate_up, plain.experts.down
    return block.eval()


def plain_layer(shape: Shape, dtype: torch.dtype) -> MoE:
    """The parameters, in the demo's plain module."""
    torch.manual_seed(0)
    return make_moe(shape.hidden, shape.width, shape.experts, shape.top_k, dtype)


def layer_inputs(shape: Shape, dtype: torch.dtype, tokens: tuple[int, ...]) -> dict[int, Tensor]:
    """The same x [T, H] in every process, by T."""
    torch.manual_seed(1)
    return {t: torch.randn(t, shape.hidden).to(dtype) for t in tokens}


def active_experts(plain: MoE, x: Tensor) -> int:
    """Distinct experts that x [T, H] hits."""
    return int(plain.gate(x).topk(plain.top_k).indices.unique().numel())


@dataclass(frozen=True)
class Wanted:
    """The fp32 result and the tokens whose choice of experts does not hang on rounding."""

    exact: Tensor
    clear: Tensor
    tolerance: float

    def verdict(self, y: Tensor) -> str:
        """Empty where y is right, else how wrong."""
        error = relative_error(y.reshape(self.exact.shape)[self.clear], self.exact[self.clear])
        return "" if error <= self.tolerance else f"WRONG: relative error {error:.1e}, allowed {self.tolerance:.0e}"


def wanted(plain: MoE, x: Tensor) -> Wanted:
    """What every way must give for x [T, H]."""
    logits = plain.gate(x)
    best = logits.float().topk(min(plain.top_k + 1, logits.shape[1]), dim=-1).values
    gap = best[:, plain.top_k - 1] - best[:, -1] if best.shape[1] > plain.top_k else torch.full((len(x),), torch.inf)
    clear = gap > 4 * torch.finfo(x.dtype).eps * logits.float().abs().amax(-1)
    return Wanted(reference(plain, x, logits.topk(plain.top_k).indices), clear, TOLERANCE[x.dtype])


def check_names(parser: argparse.ArgumentParser, asked: argparse.Namespace, **options: Collection[str]) -> None:
    """Every name in the lists of these options is one that there is; else the parser says which is not, and ends."""
    for name, known in options.items():
        unknown = [each for each in getattr(asked, name).split(",") if each not in known]
        if unknown:
            parser.error(f"--{name} {unknown[0]!r} is unknown; expected of {_names(known)}")


def _names(known: Collection[str]) -> str:
    return str(known) if isinstance(known, Layers) else ", ".join(known)


def add_ways(parser: argparse.ArgumentParser) -> None:
    """The option that `only` reads."""
    parser.add_argument("--ways", default="", help="of the ways in the table, only these: moec,eager (default: all)")


def only(names: str, ways: Sequence[Way]) -> list[Way]:
    """The ways named, in their own order; all where none is. Ends the program for a name that there is not."""
    kept = asked_for(names, [way.name for way in ways])
    return [way for way in ways if way.name in kept]


def asked_for(names: str, known: Sequence[str]) -> list[str]:
    """Of the known ways those named; all where none is. Ends the program for a name that there is not."""
    wanted = [name for name in re.split(r",(?! )", names) if name]  # some names have a comma and a space
    for name in wanted:
        if name not in known:
            raise SystemExit(f"--ways {name!r} is unknown; expected of {', '.join(known)}")
    return [name for name in known if not wanted or name in wanted]


def add_race(
    parser: argparse.ArgumentParser,
    name: str,
    *,
    tokens: str,
    dtypes: str,
    repeats: int,
    budget: float,
    seconds: float,
    patience: float,
) -> None:
    """The options that `race_layers` reads, with these defaults, and where the benchmark `name` writes."""
    parser.add_argument("--layers", default="A,B", help=f"of {LAYERS}")
    parser.add_argument("--tokens", default=tokens)
    parser.add_argument("--dtypes", default=dtypes, help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--repeats", type=int, default=repeats, help="calls a cell, at most")
    parser.add_argument("--budget", type=float, default=budget, help="seconds to prepare one alternative")
    parser.add_argument("--seconds", type=float, default=seconds, help="seconds to time one token count")
    skips = "skip alternatives whose call is expected to be slower"
    parser.add_argument("--patience", type=float, default=patience, help=skips)
    add_ways(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--plot", type=Path, help="also write a PNG (needs the bench extra)")


@dataclass(frozen=True)
class Raced:
    """One layer and dtype: its title, what the machine can do, and a row for each token count."""

    title: str
    shape: Shape
    dtype: str
    ceilings: Ceilings
    rows: tuple[Row, ...]


def race_layers(
    asked: argparse.Namespace,
    ways: Callable[[Shape, str, tuple[int, ...]], Sequence[Way]],
    console: Console,
    say: Console,
    kind: str = "",
    limit: Callable[[Layer], Layer] = lambda layer: layer,
) -> Iterator[Raced]:
    """Each layer and dtype asked for, timed and shown as a table; `kind` is said in titles, `limit` what bounds it."""
    tokens = tuple(map(int, asked.tokens.split(",")))
    budget = Budget(asked.patience, asked.budget, asked.seconds, repeats=asked.repeats)
    for dtype in asked.dtypes.split(","):
        ceilings = measure_ceilings(DTYPES[dtype])
        for name in asked.layers.split(","):
            shape = LAYERS[name]
            plain = plain_layer(shape, DTYPES[dtype])
            rows = race(
                only(asked.ways, ways(shape, dtype, tokens)),
                layer_inputs(shape, DTYPES[dtype], tokens),
                limit(shape.layer(DTYPES[dtype])),
                ceilings,
                partial(active_experts, plain),
                budget,
                step=lambda text: say.log(text),
            )
            title = f"{name} {dtype}{kind}: {shape}"
            names = list(dict.fromkeys(n for row in rows for n in (*row.times, *row.skipped)))
            show_rows(console, times_table(title, rows, names), rows)
            yield Raced(title, shape, dtype, ceilings, rows)


def write_race(
    name: str, raced: Sequence[Raced], asked: argparse.Namespace, say: Console, more: Mapping[str, Any]
) -> None:
    """Write all that was raced, and `more`, as JSON; the plot where it was asked for."""
    tables = {each.title: each.rows for each in raced}
    limits = {each.dtype: asdict(each.ceilings) for each in raced}
    say.print(f"wrote {write_json(name, {'ceilings': limits, 'layers': rows_data(tables), **more}, asked.out)}")
    if asked.plot:
        plot_times(tables, asked.plot)
        say.print(f"wrote {asked.plot}")


def show_rows(console: Console, table: Table, rows: Sequence[Row]) -> None:
    """A table of ways, and why cells of it are empty."""
    console.print(table)
    for line in empty_cells(rows):
        console.print(line, style="dim", highlight=False)


def rows_data(tables: Mapping[str, Sequence[Row]]) -> dict[str, list[dict[str, Any]]]:
    """Rows as JSON takes them, each with the name of the best alternative."""
    return {title: [asdict(row) | {"best": row.best} for row in rows] for title, rows in tables.items()}


def panels(count: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure, drawn without a screen, and its axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(width * count, height), squeeze=False)
    figure.suptitle(environment_line(), fontsize=8)
    return figure, axes[0]


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure; its folder is made."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot_times(tables: Mapping[str, Sequence[Row]], path: Path) -> None:
    """One panel a layer and dtype: ms over tokens, with the limit."""
    figure, axes = panels(len(tables), 5.2, 4.2)
    for axis, (title, rows) in zip(axes, tables.items(), strict=True):
        for name in dict.fromkeys(name for row in rows for name in row.times):
            points = [(row.tokens, row.times[name].median) for row in rows if name in row.times]
            axis.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=2.5 if name == MOEC else 1)
        axis.plot(
            [r.tokens for r in rows], [r.limit_ms for r in rows], "k--", marker="_", label="limit of this machine"
        )
        axis.set(title=title, xlabel="tokens", ylabel="ms a layer", xscale="log", yscale="log")
        axis.legend(fontsize=7)
    save_figure(figure, path)


def write_json(name: str, data: dict[str, Any], path: Path | None = None) -> Path:
    """Write results with the environment and the date; returns where."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    path.write_text(json.dumps({"date": stamp, "environment": environment_line(), **data}, indent=2) + "\n")
    return path
