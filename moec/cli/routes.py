"""`moec routes TARGET`: which experts the tokens go to, recorded while the target runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.io import console, print_json, say
from moec.cli.types import BROKEN_PROMISE, OK, Debug, Json, OptionPairs, TargetArgument
from moec.tools.typed import check_writable, parse_options

if TYPE_CHECKING:
    from rich.table import Table

    from moec.sizing.loads import Load
    from moec.tools.routes import Batch


def routes_command(
    target: TargetArgument,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="Write JSON lines, one a layer.", show_default=False)
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(
            "--batches",
            metavar="TARGET",
            help="module:callable or file.py:callable that gives the batches: tuples of arguments.",
            show_default=False,
        ),
    ] = None,
    choices: Annotated[
        int,
        typer.Option("--choices", metavar="N", min=0, help="Also keep each layer's choices of experts for N tokens."),
    ] = 0,
    options: OptionPairs = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Run a model and record how many tokens each expert of each layer gets, fused or not.

    Exit code 1: no layer's choice of experts could be seen.
    """
    from moec.options import Options
    from moec.sizing.loads import load_data, write_loads
    from moec.tools.loading import load, load_batches
    from moec.tools.routes import record

    check_writable("--out", out)
    wanted = Options.make(parse_options(options or []))
    loaded = load(target)
    given: list[Batch] = [(loaded.args, loaded.kwargs)]
    if batches is not None:
        given = list(load_batches(batches))
    with console(stderr=True).status(f"running {target} on {len(given)} batches"):
        loads, _ = record(loaded, given, wanted, choices)
    if out is not None:
        write_loads(loads, out)
        say(f"wrote {out}")
    if json:
        print_json([_data(load, load_data(load)) for load in loads])
    elif loads:
        console().print(loads_table(loads))
    else:
        console().print("no layer's choice of experts was seen; `moec explain` says what was found")
    return OK if loads else BROKEN_PROMISE


def _data(load: Load, fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "imbalance": load.imbalance, "entropy": load.entropy, "idle": load.idle}


def loads_table(loads: Iterable[Load]) -> Table:
    """One row a layer."""
    from rich import box

    from moec.view.fitting import FittingTable

    table = FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    table.add_column("layer", overflow="fold")
    for name in ("tokens", "batches", "k", "E", "max / mean", "entropy", "idle experts", "busiest", "cos to gate"):
        table.add_column(name, justify="right")
    for load in loads:
        total = load.total
        busiest = max(range(load.experts), key=total.__getitem__)
        table.add_row(
            load.site,
            str(load.tokens),
            str(len(load.batches)),
            str(load.k),
            str(load.experts),
            f"{load.imbalance:.2f}",
            f"{load.entropy:.3f}",
            f"{load.idle:.1f}",
            f"#{busiest}: {100 * total[busiest] / max(sum(total), 1):.0f} %",
            f"{load.angles.delta():.3f} … {load.angles.cosines[-1]:.3f}" if load.angles else "–",
        )
    return table
