"""`moec diff A B`: two runs compared pass by pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.io import console, print_json
from moec.cli.types import BROKEN_PROMISE, OK, Debug, Json, NoGrad, OptionPairs, report_of
from moec.tools.typed import parse_options

if TYPE_CHECKING:
    from moec.tools.runs import Run

FIRST = Annotated[
    str,
    typer.Argument(
        metavar="A", help="A target, or a file by `moec inspect TARGET --passes --json`.", show_default=False
    ),
]
SECOND = Annotated[
    str | None, typer.Argument(metavar="B", help="Another; A again where it is left out.", show_default=False)
]


def diff_command(
    a: FIRST,
    b: SECOND = None,
    options: OptionPairs = None,
    other: Annotated[
        list[str] | None,
        typer.Option("--other", metavar="KEY=VALUE", help="Options of B, else the same as A's.", show_default=False),
    ] = None,
    no_grad: NoGrad = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Compare two models, or one under two sets of options: what every pass left in the graph, and each layer.

    Exit code 0: no difference. 1: there is one.
    """
    from moec.tools.runs import compare

    if other is not None:
        parse_options(other, "--other")  # before A is compiled
    left = _run(a, options, no_grad, "A")
    right = _run(b or a, options if other is None else other, no_grad, "B")
    found = compare(left, right)
    if json:
        print_json([{"where": d.where, "diff": d.text} for d in found])
    else:
        _show(left, right, [(d.where, d.text) for d in found])
    return BROKEN_PROMISE if found else OK


def _run(what: str, options: list[str] | None, no_grad: bool, letter: str) -> Run:
    from moec.tools.runs import read_run, run_of_report

    if what.endswith(".json"):
        return read_run(Path(what))
    name = " ".join((f"{letter}:", what, *(options or ())))
    return run_of_report(name, report_of(what, options, no_grad))


def _show(a: Run, b: Run, found: list[tuple[str, str]]) -> None:
    from rich.text import Text

    from moec.view.tables import diff_style

    screen = console()
    if not found:
        screen.print(f"no difference in {len(a.texts)} passes and {len(a.sites)} layers", highlight=False)
    for where, text in found:
        screen.print(Text(where, "bold cyan"))
        for line in text.splitlines():
            screen.print(Text(line, diff_style(line)), soft_wrap=True)
