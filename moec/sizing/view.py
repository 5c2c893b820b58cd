"""Sizings of layers as tables for people, and as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from moec.sizing.angles import NEARLY
from moec.sizing.drops import CONFIDENCE, Sized
from moec.sizing.layer import Bound, Local, Sizing
from moec.view.fitting import FittingTable


def sizings_view(sizings: Sequence[Sizing]) -> RenderableType:
    """Everything, layers that differ in their name alone together."""
    parts: list[RenderableType] = [Rule("capacity", align="left")]
    for names, sizing in _alike(sizings):
        parts += [Text(names, "bold"), *_layer(sizing)]
    if not sizings:
        parts.append(Text("no layer was fused: nothing to size", "yellow"))
    return Group(*parts)


def _alike(sizings: Sequence[Sizing]) -> Iterator[tuple[str, Sizing]]:
    groups: dict[object, list[Sizing]] = {}
    for sizing in sizings:
        key = (sizing.capacity, sizing.drops, sizing.bounds, sizing.sized, sizing.local, sizing.note)
        groups.setdefault(key, []).append(sizing)
    for same in groups.values():
        many = f" … {same[-1].layer} ({len(same)} layers)" if len(same) > 1 else ""
        yield same[0].layer + many, same[0]


def _layer(sizing: Sizing) -> Iterator[RenderableType]:
    yield Text(f"  capacity: {sizing.capacity}")
    yield Text(f"  drops: {sizing.drops}", "" if sizing.drops.startswith("never") else "yellow")
    yield _bounds_table(sizing)
    if sizing.note:
        yield Text(f"  {sizing.note}", "dim")
    if sizing.sized:
        yield from (Text(f"  {line}") for line in _sized(sizing.sized))
    if sizing.local:
        yield from (Text(f"  {line}") for line in _local(sizing.local))


def _bounds_table(sizing: Sizing) -> Table:
    low, high = sizing.tokens
    table = FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    table.add_column("at most", no_wrap=True)
    table.add_column("for T tokens", overflow="fold")
    for count in dict.fromkeys((low, high)):
        table.add_column(f"T = {count}", justify="right", no_wrap=True)
    for bound in sizing.bounds:
        values = bound.values if low != high else bound.values[:1]
        table.add_row(bound.name, bound.formula, *(_amount(bound, value) for value in values))
    return table


def _amount(bound: Bound, value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if bound.unit == "rows" else f"{value / 1e6:,.2f} MB"


def _sized(s: Sized) -> Iterator[str]:
    factor = f"{float(s.factor):.3g}"
    yield f"from recorded loads, to drop at most {s.wanted:.3%} of pairs: C = ⌈{factor}·(pairs / E)⌉,"
    yield f"  {s.capacity:,} rows an expert for the {s.largest:,} pairs of the largest batch"
    yield f"  based on {s.batches:,} batches, {s.tokens:,} tokens, {s.pairs:,} pairs: {s.covered:.2%} of the loads fit,"
    yield f"  {s.dropped:.3%} of all pairs would have been dropped, {s.worst:.3%} in the worst batch"
    over = f"{s.over} of {s.batches} batches drop more than wanted"
    yield f"  {over}: with {CONFIDENCE:.0%} confidence at most {s.at_most:.1%} of batches like these do"
    yield f"  with perfectly even loads the factor could not be below {s.floor:.3g}"


def _local(local: Local) -> Iterator[str]:
    a = local.angles
    yield f"LocMoE's lower bound: {local.exact:.3g} rows an expert (its exponential: {local.simple:.3g}),"
    yield f"  from δ = {local.delta:.3f} (cosine of the largest accepted angle, {a.pairs:,} pairs) and D = {a.channels}"
    held = "holds" if a.orthogonal else "does not hold, so this is a hint"
    yield f"  its precondition, orthogonal gates, {held}: the largest |cosine| of two is {a.gates:.3f}, limit {NEARLY}"
    if local.delta <= 0:
        yield "  tokens are accepted at more than 90°: the bound says nothing here"


def sizing_data(sizing: Sizing) -> dict[str, Any]:
    """The same for --json."""
    data = asdict(sizing)
    if sizing.sized:
        data["sized"]["factor"] = float(sizing.sized.factor)
        data["sized"]["confidence"] = CONFIDENCE
    if sizing.local:
        data["local"]["precondition"] = sizing.local.angles.orthogonal
    return data
