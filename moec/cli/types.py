"""The arguments and options that several commands take, and a compiled target's report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.io import console
from moec.tools.typed import parse_options

if TYPE_CHECKING:
    from moec.report import Report

OK, BROKEN_PROMISE, BAD_INPUT, STOPPED = 0, 1, 2, 130
"""Exit codes."""

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="module:callable or file.py:callable that returns (model, args) or (model, args, kwargs).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; all else goes to stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
NoGrad = Annotated[bool, typer.Option("--no-grad", help="Compile as for inference, under torch.no_grad().")]
OptionPairs = Annotated[
    list[str] | None,
    typer.Option(
        "--options",
        metavar="KEY=VALUE",
        help="Options of the backend, separated by commas, such as rest=eager,proof=off (docs/options.md lists them).",
        show_default=False,
    ),
]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="PATH", help="Write all of it as one HTML page that needs no other file.", show_default=False
    ),
]


def report_of(target: str, options: list[str] | None, no_grad: bool, symbolic: bool = False) -> Report:
    """Load and compile a target; raises TargetError or OptionError for bad input.

    `symbolic`: T is a symbol from the first compile on, as it would be once a second number of tokens is seen.
    """
    import torch

    from moec.backend import explain_call
    from moec.options import Options
    from moec.tools.loading import load

    values = Options.make(parse_options(options or []))
    loaded = load(target)
    with console(stderr=True).status(f"compiling {target}"), torch.set_grad_enabled(not no_grad):
        return explain_call(loaded.model, loaded.args, loaded.kwargs, values, symbolic)
