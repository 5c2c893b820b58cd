"""Plans of exchanges as tables for people, and as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from moec.spread.plan import Plan
from moec.view.fitting import FittingTable


def plans_view(plans: Sequence[Plan]) -> RenderableType:
    """Everything, layers that differ in their name alone together."""
    parts: list[RenderableType] = [Rule("exchange", align="left")]
    for names, plan in _alike(plans):
        parts += [Text(names, "bold"), Text(f"  {_what(plan)}"), _table(plan)]
    if plans:
        parts.append(Text("modelled, not measured: rows and bytes of one token on average, not time", "dim"))
    else:
        parts.append(Text("no layer with kernels was found: nothing to spread", "yellow"))
    return Group(*parts)


def plan_data(plan: Plan) -> dict[str, Any]:
    """For --json; the placement as the rank of each expert."""
    return {
        "layer": plan.layer,
        "experts": plan.experts,
        "k": plan.k,
        "hidden": plan.hidden,
        "ranks": plan.cluster.ranks,
        "ranks_per_node": plan.cluster.size,
        "based_on": plan.based_on,
        "modelled": True,
        "schemes": [asdict(scheme) for scheme in plan.schemes],
        "placed": list(plan.placed.owners) if plan.placed else None,
    }


def _what(plan: Plan) -> str:
    cluster = plan.cluster
    nodes = f" on {cluster.ranks // cluster.size} nodes" if cluster.size > 1 else ""
    layer = f"{plan.experts} experts, k = {plan.k}, H = {plan.hidden}"
    return f"{layer}, {cluster.ranks} ranks{nodes}; {plan.based_on}"


def _alike(plans: Sequence[Plan]) -> Iterator[tuple[str, Plan]]:
    groups: dict[object, list[Plan]] = {}
    for plan in plans:
        groups.setdefault((_what(plan), plan.schemes), []).append(plan)
    for same in groups.values():
        many = f" … {same[-1].layer} ({len(same)} layers)" if len(same) > 1 else ""
        yield same[0].layer + many, same[0]


def _table(plan: Plan) -> Table:
    table = FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for name in ("experts", "rows"):
        table.add_column(name, no_wrap=True)
    nodes = plan.cluster.size > 1
    for name in ("rows a token", "bytes forward", "bytes a step"):
        table.add_column(name, justify="right")
        if nodes:
            table.add_column("across nodes", justify="right")
    table.add_column("busiest rank", justify="right", no_wrap=True)
    for scheme in plan.schemes:
        cells: list[str] = []
        for rows, form in ((scheme.rows, ".2f"), (scheme.forward, ",.0f"), (scheme.step, ",.0f")):
            cells += [format(rows.ranks, form), *([format(rows.nodes, form)] if nodes else [])]
        table.add_row(scheme.placement, scheme.name, *cells, f"{scheme.busiest:.2f} × mean")
    return table
