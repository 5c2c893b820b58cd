"""Tables in narrow windows: no word is cut, no number is lost."""

from __future__ import annotations

import io

import pytest
from rich import box
from rich.console import Console
from rich.text import Text

from moec.view.fitting import FittingTable

CELLS = (("layers.0.mlp", "agrees", "5e-07", "100.00 %"), ("layers.1.mlp", "differs", "", "99.12 %"))


def shown(width, fold=False):
    table = FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("layer", "verdict", "own dtypes", "same experts"):
        table.add_column(name, overflow="fold" if fold else "ellipsis")
    for cells in CELLS:
        table.add_row(*map(Text, cells))
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_table_that_fits_is_a_table(width):
    assert len(shown(width).splitlines()) <= 5
    assert "layers.0.mlp   agrees" in shown(width)


@pytest.mark.parametrize("width", range(37, 60))
def test_no_word_is_cut_where_a_table_just_fits_or_does_not(width):
    text = shown(width)
    assert "…" not in text
    words = text.split()
    assert all(word in words for cells in CELLS for cell in cells for word in cell.split())
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [24, 32])
def test_a_narrow_window_shows_each_row_as_a_block(width):
    text = shown(width)
    assert "…" not in text
    assert text.splitlines()[0].strip() == "layers.0.mlp"
    assert "  verdict: agrees" in text
    words = text.split()
    assert all(word in words for cells in CELLS for cell in cells for word in cell.split())
    assert text.count("own dtypes:") == 1  # an empty cell is no line


def test_long_words_may_be_folded_where_the_column_says_so():
    long = "a/path/without/any/space/in/it/that/is/long.py"
    table = FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("what")
    table.add_column("where", overflow="fold")
    table.add_row("x", long)
    out = io.StringIO()
    Console(file=out, width=40).print(table)
    assert "what   where" in out.getvalue()
