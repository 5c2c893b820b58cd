"""What `moec verify` shows: one row a rewrite, what differs, and the whole model."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moec.tools.proving import Checked, Verification
from moec.view.fitting import FittingTable

STYLE = {"agrees": "green", "differs": "red", "unproved": "yellow"}


def verification_view(found: Verification) -> Iterator[RenderableType]:
    """The table, then everything that is not as it should be."""
    if found.rewrites:
        yield _table(found.rewrites)
    else:
        yield Text("no MoE layer was fused, so there is nothing to verify; moec explain says why", "yellow")
    for each in found.rewrites:
        for line in each.seen.wrong[:5] if each.seen else [each.reason]:
            yield Text(f"{each.name}: {line}", STYLE[each.status])
        for note in each.seen.notes if each.seen else []:
            yield Text(f"{each.name}: {note}", "dim")
    for site in found.declined:
        yield Text(f"{site.name}: not fused: {'; '.join(map(str, site.reasons))}", "yellow")
    whole = found.whole
    gradients = "no gradients" if whole.gradients is None else f"gradients {whole.gradients:.1e}"
    text = f"whole model against eager: outputs {whole.outputs:.1e}, {gradients} (allowed {whole.allowed:.0e})"
    yield Text(text, "green" if whole.equal else "red")


def _table(rewrites: tuple[Checked, ...]) -> Table:
    table = FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    names = ("fp64 error", "own dtypes", "gradients", "same experts", "trials", "routings", "x")
    for name in names:
        table.add_column(name, overflow="fold")
    for each in rewrites:
        verdict = Text(each.status, STYLE[each.status])
        if each.seen is None:
            table.add_row(Text(each.name), verdict, *("–" for _ in names))
            continue
        seen = each.seen
        cells = (
            f"{seen.exact:.0e}",
            f"{seen.own:.0e}",
            "–" if seen.gradients is None else f"{seen.gradients:.0e}",
            "the model's own" if seen.agreement is None else f"{100 * seen.agreement:.2f} %",
            str(seen.trials),
            ", ".join(seen.routings),
            " ".join(str(list(size)) for size in seen.sizes),
        )
        table.add_row(Text(each.name), verdict, *map(Text, cells))
    return table
