"""What spreading a found layer's experts over ranks would cost, for placements and schemes beside each other: modelled.

No process is started: any number of ranks can be planned on one machine. Bytes are counted, time is not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moec.codegen.tuning import Sizes
from moec.errors import TargetError
from moec.exchange.cost import Reach, RowBytes, Rows, chances_of, reach, recorded_reach, rows_of
from moec.exchange.placement import Placement, Placements
from moec.exchange.placing import place, together
from moec.ir.dtypes import DTYPES
from moec.ir.site_parse import parse_site
from moec.ir.spec import KernelSpec
from moec.report import Report, Site
from moec.sizing.loads import Load
from moec.sizing.site_sizes import sizes_of

FEW = 64
"""Recorded choices below this say too little of which experts go together."""


@dataclass(frozen=True)
class Cluster:
    """R ranks on nodes of `size` ranks each; one rank a node where nodes are not told apart."""

    ranks: int
    size: int = 1

    @staticmethod
    def parse(text: str) -> Cluster:
        """`64` or `64x8`: 64 ranks on 8 nodes; raises TargetError."""
        found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
        ranks, nodes = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if ranks < 2 or nodes < 1 or ranks % nodes:
            wanted = "RANKS or RANKSxNODES such as 64x8: 2 ranks or more, the same number on each node"
            raise TargetError(f"--exchange {text!r}: expected {wanted}")
        return Cluster(ranks, ranks // nodes)


@dataclass(frozen=True)
class Scheme:
    """One way to send rows under one placement: rows and bytes a token, in all and across nodes, forward and a step."""

    placement: str
    name: str
    rows: Rows
    forward: Rows
    step: Rows
    busiest: float


@dataclass(frozen=True)
class Plan:
    """One layer. based_on: where the routing comes from; placed: by co-activation, where choices were recorded."""

    layer: str
    experts: int
    k: int
    hidden: int
    cluster: Cluster
    based_on: str
    schemes: tuple[Scheme, ...]
    placed: Placement | None = None


def plans(report: Report, cluster: Cluster, loads: Sequence[Load] = ()) -> tuple[Plan, ...]:
    """One for each fused layer with kernels of moec's; raises TargetError where no load is of a layer of the model."""
    sites = [site for site in report.sites if site.status == "fused" and site.spec]
    by_name = {load.site: load for load in loads}
    if loads and by_name.keys().isdisjoint(site.name for site in sites):
        have = ", ".join(site.name for site in sites) or "none"
        raise TargetError(f"the loads are of {', '.join(by_name)}; the model's layers are {have}")
    return tuple(_plan(site, cluster, by_name.get(site.name)) for site in sites)


def placements_of(found: Sequence[Plan], cluster: Cluster) -> Placements:
    """The placements by co-activation, for a file; raises TargetError where there are none."""
    layers = {plan.layer: plan.placed for plan in found if plan.placed is not None}
    if not layers:
        raise TargetError(
            f"nothing to place: record at least {FEW} choices with `moec routes --choices`, and give --loads"
        )
    return Placements(cluster.ranks, layers)


def _plan(site: Site, cluster: Cluster, load: Load | None) -> Plan:
    sizes = sizes_of(site)
    if load is not None and load.experts != sizes.E:
        raise TargetError(f"layer {site.name}: {sizes.E} experts, and {load.experts} in the loads")
    blocks = Placement.blocks(sizes.E, cluster.ranks)
    placed: Placement | None = None
    if load is not None and len(load.choices) >= FEW:
        half = len(load.choices) // 2  # a placement is judged by tokens that it was not made for
        based = f"{len(load.choices) - half} recorded tokens, placed by {half} others"
        placed = _placed(load, load.choices[:half], cluster)
        reaches = [(blocks, recorded_reach(load.choices[half:], blocks, cluster.size))]
        reaches.append((placed, recorded_reach(load.choices[half:], placed, cluster.size)))
    else:
        chances = chances_of(load.total if load else (0,) * sizes.E, sizes.k)
        based = "recorded loads, otherwise random choices" if load else "even random choices"
        reaches = [(blocks, reach(chances, sizes.k, blocks, cluster.size))]
    schemes = tuple(s for at, found in reaches for s in _schemes(site, cluster, at is blocks, found, sizes))
    return Plan(site.name, sizes.E, sizes.k, sizes.H, cluster, based, schemes, placed)


def _placed(load: Load, choices: Sequence[Sequence[int]], cluster: Cluster) -> Placement:
    return place(together(choices, load.experts), load.total, cluster.ranks, cluster.size if cluster.size > 1 else 0)


def _schemes(site: Site, cluster: Cluster, blocks: bool, found: Reach, sizes: Sizes) -> list[Scheme]:
    parsed, spec = parse_site(site.ir), KernelSpec.parse(site.spec)
    x, y, weight = (DTYPES[name].itemsize for name in (parsed.x_type.dtype, spec.y_dtype, parsed.weight.dtype))
    made: list[Scheme] = []
    k = sizes.k
    for name, rows in rows_of(found, k, cluster.ranks, cluster.size).items():
        size = RowBytes.of(sizes.H, x, y, weight, 1 if name.endswith("choice") else k, sizes.O)
        forward = Rows(rows.ranks * size.forward, rows.nodes * size.forward)
        step = Rows(rows.ranks * size.step, rows.nodes * size.step)
        made.append(Scheme("blocks" if blocks else "by co-activation", name, rows, forward, step, found.busiest))
    return made
