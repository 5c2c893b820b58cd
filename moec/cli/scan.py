"""`moec scan WHAT`: what would be fused in a file, package, module or target, without weights or data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.io import console, print_json
from moec.cli.types import BROKEN_PROMISE, OK, Debug, Json, OptionPairs
from moec.errors import TargetError
from moec.tools.typed import parse_options

if TYPE_CHECKING:
    from rich.table import Table

    from moec.options import Options
    from moec.tools.scan import Scanned

WHAT = Annotated[
    str,
    typer.Argument(
        metavar="WHAT",
        help="file.py, a package's folder or a module (all its module classes), or one PLACE:name in it.",
        show_default=False,
    ),
]
INPUTS = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="DTYPE[SIZES]",
        help="A tensor to call it with: 'f32[2, 7, 64]'; once for each argument.",
        show_default=False,
    ),
]


def scan_command(
    what: WHAT,
    args: Annotated[
        list[str] | None,
        typer.Option(
            "--args", metavar="NAME=VALUE", help="Constructor arguments: dim=64,num_experts=8.", show_default=False
        ),
    ] = None,
    inputs: INPUTS = None,
    options: OptionPairs = None,
    grad: Annotated[bool, typer.Option("--grad/--no-grad", help="As for training, or for inference.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Say which MoE layers of a file, package or module would be fused. Nothing is loaded, computed or compiled.

    Exit code 0: a layer was found and every one would be fused. 1: none was found, or one would not be.
    """
    import torch

    from moec.options import Options

    wanted = Options.make(parse_options(options or []))
    with console(stderr=True).status(f"reading {what}") as status, torch.set_grad_enabled(grad):
        found = _scan(what, args or [], inputs or [], wanted, lambda name: status.update(f"scanning {name}"))
    if json:
        print_json([_data(each) for each in found])
    else:
        _show(found)
    sites = [site for each in found if each.report for site in each.report.sites]
    return OK if sites and all(site.status == "fused" for site in sites) else BROKEN_PROMISE


def _scan(what: str, args: list[str], inputs: list[str], options: Options, step: Any) -> list[Scanned]:
    from torch import nn

    from moec.tools.loading import load, module_classes, named
    from moec.tools.scan import parse_input, scan_classes, scan_factory

    given = dict(_pair(pair) for text in args for pair in text.split(",") if pair.strip())
    tensors = [parse_input(text) for text in inputs]
    place, colon, _ = what.rpartition(":")
    if colon and place:
        one = named(what)
        if not (isinstance(one, type) and issubclass(one, nn.Module)):
            return [scan_factory(what, lambda: load(what), options)]
        classes = [one]
    else:
        classes = module_classes(what)
        if not classes:
            raise TargetError(f"{what!r} defines no module class; expected classes that derive from torch.nn.Module")
    return list(scan_classes(classes, given, tensors, options, step))


def _pair(text: str) -> tuple[str, Any]:
    import ast

    name, equals, value = text.partition("=")
    if not equals:
        raise TargetError(f"--args {text!r} is not name=value; for example --args dim=64,num_experts=8")
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        return name.strip(), value.strip()


def _data(each: Scanned) -> dict[str, Any]:
    found = each.report.to_dict(texts=False) if each.report else None
    return {"name": each.name, "inputs": each.inputs, "why": each.why, "holds": each.holds, "report": found}


def _show(found: Iterable[Scanned]) -> None:
    from moec.view.tables import alike, ladder

    screen = console()
    listed = list(found)
    screen.print(scan_table(listed))
    for each in listed:
        for group in alike(each.report.near_misses) if each.report else ():
            screen.print(ladder(group))


def scan_table(found: Iterable[Scanned]) -> Table:
    """One row a class."""
    from rich import box
    from rich.text import Text

    from moec.view.fitting import FittingTable

    table = FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for name in ("module", "called with", "MoE layers", "would be fused", "what was found"):
        table.add_column(name, overflow="fold", justify="right" if name in ("MoE layers", "would be fused") else "left")
    for each in found:
        sites = each.report.sites if each.report else []
        fused = sum(site.status == "fused" for site in sites)
        table.add_row(
            Text(each.name),
            Text(each.inputs or "–"),
            str(len(sites)) if each.report else "?",
            Text(str(fused), "green" if fused and fused == len(sites) else "") if sites else "–",
            Text(_found(each)),
        )
    return table


def _found(each: Scanned) -> str:
    if each.holds:
        return f"holds {', '.join(each.holds)}"
    if each.report is None:
        return each.why
    texts = dict.fromkeys(f"{s.form or s.router}: {s.experts}" for s in each.report.sites)
    breaks = len(each.report.graph_breaks)
    return "; ".join((*texts, *([f"{breaks} graph breaks"] if breaks else []))) or "no MoE layer"
