"""The README's table of spellings says what a run of its examples says."""

from __future__ import annotations

import pytest
from spelling_table import README, WHAT, all_spellings, measured, rows, shown

EXAMPLES = all_spellings()
FIRST = [next(s for s in EXAMPLES if s.spelling == number) for number in WHAT]


def cells() -> dict[str, list[str]]:
    """The README's rows by the spelling's number."""
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown(README.read_text())[2:]]
    return {row[0]: row[1:] for row in table}


def test_the_readme_has_every_spelling_with_all_its_examples():
    counts = {number: [what, str(sum(s.spelling == number for s in EXAMPLES))] for number, what in WHAT.items()}
    assert {number: row[:2] for number, row in cells().items()} == counts
    assert {s.spelling for s in EXAMPLES} == set(WHAT)
    assert all(int(count) >= 3 for _, count in counts.values())


@pytest.mark.parametrize("spelling", FIRST, ids=lambda s: f"{s.spelling}-{s.name}")
def test_one_example_of_each_row_is_as_the_readme_says(spelling):
    found = measured(spelling, counts=(12,), trained=False)
    says = cells()[spelling.spelling]
    for verdict, holds in zip(says[2:5], (found.one_graph, found.fused, found.forward < 1e-5), strict=True):
        assert holds or verdict != "all", found.why


@pytest.mark.slow
def test_the_whole_table_is_what_a_run_says():
    assert shown(README.read_text()) == rows()
