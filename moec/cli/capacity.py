"""`moec inspect --capacity`: its options, checked before anything is compiled, and what is shown for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.errors import ParseError, TargetError
from moec.tools.typed import parse_options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moec.ir.token_range import TokenRange
    from moec.report import Report
    from moec.sizing.layer import Sizing
    from moec.sizing.loads import Load

RATE = 0.001

Tokens = Annotated[
    str | None,
    typer.Option("--tokens", metavar="A..B", help="With --capacity: tokens of a call.", show_default=False),
]
Loads = Annotated[
    Path | None,
    typer.Option(
        "--loads",
        metavar="FILE",
        help="With --capacity or --exchange: what `moec routes` recorded.",
        show_default=False,
    ),
]
DropRate = Annotated[
    float | None,
    typer.Option(
        "--drop-rate", metavar="R", help=f"With --loads: pairs that may be dropped ({RATE}).", show_default=False
    ),
]


@dataclass(frozen=True)
class Asked:
    """What was asked for: the range of T (None: the one that is declared), recorded loads, the wanted drop rate."""

    tokens: TokenRange | None
    loads: tuple[Load, ...]
    rate: float

    def sizings(self, report: Report, options: list[str] | None) -> tuple[Sizing, ...]:
        """One for each fused layer."""
        from moec.options import Options
        from moec.sizing.layer import sizings

        wanted = Options.make(parse_options(options or []))
        return sizings(report, self.tokens, wanted, self.loads, self.rate)

    def view(self, report: Report, options: list[str] | None) -> RenderableType:
        """For people."""
        from moec.sizing.view import sizings_view

        return sizings_view(self.sizings(report, options))

    def data(self, report: Report, options: list[str] | None) -> list[dict[str, Any]]:
        """For --json."""
        from moec.sizing.view import sizing_data

        return [sizing_data(sizing) for sizing in self.sizings(report, options)]


def capacity_asked(capacity: bool, tokens: str | None, loads: tuple[Load, ...], rate: float | None) -> Asked | None:
    """The options together; None without --capacity. Raises TargetError for what does not fit."""
    from moec.sizing.layer import parse_tokens

    given = {"--tokens": tokens, "--drop-rate": rate}
    lone = [name for name, value in given.items() if value is not None]
    if not capacity:
        if lone:
            raise TargetError(f"{', '.join(lone)}: of no use without --capacity; add it")
        return None
    if rate is not None and (not loads or not 0 <= rate < 1):
        raise TargetError(f"--drop-rate {rate}: expected a share from 0 to less than 1, and --loads FILE to size for")
    return Asked(parse_tokens(tokens) if tokens is not None else None, loads, RATE if rate is None else rate)


def loads_of(path: Path | None, used: bool) -> tuple[Load, ...]:
    """What --loads names; raises TargetError where it cannot be read, or no option uses it."""
    from moec.sizing.loads import read_loads

    if path is None:
        return ()
    if not used:
        raise TargetError("--loads: of no use without --capacity or --exchange; add one of them")
    if not path.is_file():
        raise TargetError(f"--loads {path}: no such file; `moec routes TARGET --out {path}` writes it")
    try:
        return read_loads(path)
    except (ParseError, UnicodeDecodeError) as error:
        raise TargetError(f"--loads {path}: {error}") from error
