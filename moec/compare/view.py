"""Rows of a comparison as a table: ms, how many times as long as moec, and the distance to the limit."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from moec.compare.measure import Timing
from moec.compare.ways import MOEC, Row, tokens_text
from moec.view.fitting import FittingTable

FEW_RUNS = 3  # with fewer calls than this, the cell says how many


def plain_table(title: str) -> Table:
    """A table in the house style."""
    return FittingTable(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False
    )


def times_table(title: str, rows: Sequence[Row], names: Sequence[str]) -> Table:
    """One line a way, one column a token count; below them the limit and two ratios."""
    table = plain_table(f"{title} (ms, median of up to {_most_runs(rows)} calls in turns; ×: times as long as moec)")
    table.add_column("")
    for row in rows:
        table.add_column(tokens_text(row.tokens), justify="right")
    for name in names:
        if any(name in row.times or name in row.skipped for row in rows):
            style = "bold green" if name == MOEC else ""
            table.add_row(Text(name, style), *(Text(cell(row, name), style) for row in rows))
    table.add_section()
    table.add_row("limit of this machine", *(f"{row.limit_ms:.2f}" for row in rows))
    table.add_row("moec / limit", *(_ratio(row, MOEC, row.limit_ms) for row in rows))
    table.add_row("best other / moec", *(_versus(row) for row in rows))
    return table


def cell(row: Row, name: str) -> str:
    """`3.15  2.0×`, or in a word why there is no figure."""
    timing = row.times.get(name)
    if timing is None:
        reason = row.skipped.get(name, "–")
        return reason.partition(" (")[0] if reason.startswith(">") else reason.partition(":")[0]
    if name == MOEC or MOEC not in row.times:
        return _ms(timing)
    return f"{_ms(timing)}  {timing.median / row.times[MOEC].median:.1f}×"


def _ms(timing: Timing) -> str:
    digits = 2 if timing.median < 10 else 1 if timing.median < 100 else 0
    few = f" ({timing.runs} call{'s' if timing.runs > 1 else ''})" if timing.runs < FEW_RUNS else ""
    return f"{timing.median:.{digits}f}{few}"


def _ratio(row: Row, name: str, to: float) -> str:
    return f"{row.times[name].median / to:.2f}×" if name in row.times else "–"


def _versus(row: Row) -> str:
    if row.best is None or MOEC not in row.times:
        return "–"
    return f"{row.times[row.best].median / row.times[MOEC].median:.1f}×"


def _most_runs(rows: Sequence[Row]) -> int:
    return max((timing.runs for row in rows for timing in row.times.values()), default=0)
