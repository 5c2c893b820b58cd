"""`moec inspect --exchange`: its options, checked before anything is compiled, and what is shown for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.io import say
from moec.errors import TargetError
from moec.tools.typed import check_writable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moec.report import Report
    from moec.sizing.loads import Load
    from moec.spread.plan import Cluster, Plan

Exchange = Annotated[
    str | None,
    typer.Option(
        "--exchange",
        metavar="RANKS[xNODES]",
        help="Bytes that would cross ranks and nodes if experts were spread over them; modelled.",
        show_default=False,
    ),
]
Place = Annotated[
    Path | None,
    typer.Option(
        "--place", metavar="FILE", help="With --exchange and --loads: write the placement.", show_default=False
    ),
]


@dataclass(frozen=True)
class Wanted:
    """Ranks and nodes, recorded loads, and where a placement is written."""

    cluster: Cluster
    loads: tuple[Load, ...]
    place: Path | None

    def plans(self, report: Report) -> tuple[Plan, ...]:
        """One for each layer; writes the placement where that was asked for."""
        from moec.exchange.placement import write_placements
        from moec.spread.plan import placements_of, plans

        found = plans(report, self.cluster, self.loads)
        if self.place is not None:
            write_placements(placements_of(found, self.cluster), self.place)
            say(f"wrote {self.place}")
        return found

    def view(self, report: Report) -> RenderableType:
        """For people."""
        from moec.spread.view import plans_view

        return plans_view(self.plans(report))

    def data(self, report: Report) -> list[dict[str, Any]]:
        """For --json."""
        from moec.spread.view import plan_data

        return [plan_data(plan) for plan in self.plans(report)]


def exchange_asked(exchange: str | None, loads: tuple[Load, ...], place: Path | None) -> Wanted | None:
    """The options together; None without --exchange. Raises TargetError for what does not fit."""
    from moec.spread.plan import Cluster

    if exchange is None:
        if place is not None:
            raise TargetError(f"--place {place}: of no use without --exchange; add it")
        return None
    if place is not None and not loads:
        raise TargetError(f"--place {place}: needs --loads FILE with choices, as `moec routes --choices 4096` records")
    check_writable("--place", place)
    return Wanted(Cluster.parse(exchange), loads, place)
