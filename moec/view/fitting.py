"""A table that a narrow window shows as one block of lines a row, instead of words cut to pieces."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

_BETWEEN = 3  # columns of the window between two of the table
_FOLDED = 24  # a word may be folded where there is room for so much of it: paths, names of modules


class FittingTable(Table):
    """A rich Table; where its words do not fit side by side, a row is its first cell and `name: value` below it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, or its rows as blocks."""
        least, words, most = zip(*(_widths(console, options, column) for column in self.columns), strict=True)
        room = options.max_width - _BETWEEN * (len(least) - 1) - 2 * self.show_edge
        if sum(least) > room:
            yield from self._blocks()
            return
        for column, width in zip(self.columns, _shared(_shared(least, words, room), most, room), strict=True):
            column.width = width  # rich itself would narrow the widest column, also below its words
        yield from super().__rich_console__(console, options)

    def _blocks(self) -> RenderResult:
        if self.title:
            yield _text(self.title)
        names = [_text(column.header).plain for column in self.columns]
        for row in zip(*(column.cells for column in self.columns), strict=True):
            yield Text(_text(row[0]).plain, "bold")
            for name, cell in zip(names[1:], row[1:], strict=True):
                if _text(cell).plain:
                    text = Text.assemble(f"{name}: " if name else "", _text(cell))
                    yield Padding(text, (0, 0, 0, 2), expand=False)


def _widths(console: Console, options: ConsoleOptions, column: Column) -> tuple[int, int, int]:
    """The widths in which a column can be read, in which none of its words is folded, and none of its lines wrapped."""
    widths = [Measurement.get(console, options, cell) for cell in (column.header, *column.cells)]
    most = max(width.maximum for width in widths)
    words = most if column.no_wrap else max(width.minimum for width in widths)
    return min(words, _FOLDED) if column.overflow == "fold" else words, words, most


def _shared(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """Widths that together take no more than `room`: what is left of it goes to those who would use it."""
    spare, wanted = room - sum(least), sum(most) - sum(least)
    return [
        low + min(high - low, spare * (high - low) // max(wanted, 1)) for low, high in zip(least, most, strict=True)
    ]


def _text(cell: RenderableType) -> Text:
    """A cell's words; cells are texts or markup."""
    return cell if isinstance(cell, Text) else Text.from_markup(str(cell))
