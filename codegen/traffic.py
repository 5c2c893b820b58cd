"""Bytes that a program's launches move through memory, counted from their arguments; and the fewest that any could.

A launch counts each byte that it touches once for reading and once for writing, as if its cache were perfect: what the
algorithm costs, not how well blocks share a cache (`moec.codegen.cost_model` models that).

Letters: T tokens, H hidden, F expert width, O output width, E experts, k experts a token; a pair is one (token, slot).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moec.codegen.plan import Sizes
from moec.codegen.triton_call import Launch, Program
from moec.ir.dtypes import STORED, TRITON
from moec.ir.spec import KernelSpec


@dataclass(frozen=True)
class Load:
    """Who chose whom: rows of each expert; every token has at least one expert in [0, E)."""

    spec: KernelSpec
    sizes: Sizes
    histogram: Sequence[int]

    @property
    def rows(self) -> int:
        """Pairs whose expert exists."""
        return sum(self.histogram)

    @property
    def hit(self) -> int:
        """Experts with at least one row."""
        return sum(count > 0 for count in self.histogram)

    def param_bytes(self, group: str) -> int:
        """Bytes of one parameter group of the experts that are hit."""
        e = self.spec.experts
        return (
            self.hit
            * math.prod(e.shape(group, self.sizes.H, self.sizes.F, self.sizes.O))
            * STORED[e.stored(group)].itemsize
        )


def moved_bytes(load: Load, made: Program) -> dict[str, dict[str, int]]:
    """Bytes by launch and by argument of a forward program, zeroed buffers under the name `zeros`."""
    block_m = next((int(n.constexprs()["BLOCK_M"]) for n in made.launches if "BLOCK_M" in n.constexprs()), 1)
    between = {b.name: math.prod(b.shape) for b in made.buffers if b.name in ("parts", "counts")}
    found = {launch.kernel: _of_launch(load, launch, block_m, between) for launch in made.launches}
    zeros = {b.name: math.prod(b.shape) * 4 for b in made.buffers if b.zeros}
    return found | ({"zeros": zeros} if zeros else {})


def _of_launch(load: Load, launch: Launch, block_m: int, between: Mapping[str, int]) -> dict[str, int]:
    s, groups = load.sizes, load.spec.experts.param_groups
    tiles = sum(-(-count // block_m) for count in load.histogram)
    atomic = bool(launch.constexprs().get("ATOMIC"))
    elements: Mapping[str, int] = {
        "x": s.T * s.H, "router": s.E * s.H, "router_bias": s.E, "selection": s.E, "logits": s.T * s.E,
        "weights": s.T * s.k, "experts": s.T * s.k, "order": load.rows, "offsets": s.E + 1, "tile_expert": tiles,
        "tile_row": tiles, "counters": 6, "h": load.rows * s.F, "slots": (s.T if atomic else load.rows) * s.O,
        "y": s.T * s.O, "rows": load.rows * s.H, **between,
    }  # fmt: skip
    found: dict[str, int] = {}
    for argument in launch.arguments:
        if not argument.type.startswith("*"):
            continue
        name, each = argument.name, TRITON[argument.type[1:]].itemsize
        if name in groups:
            table = 0 if load.spec.experts.stacked else load.hit * each
            found[name] = table + load.param_bytes(name)
        else:
            found[name] = elements[argument.binding or name] * each * _times(launch, name)
    return found


def _times(launch: Launch, name: str) -> int:
    """How often a launch touches an argument: what it writes and reads again twice; atomic sums ask for no expert."""
    values = launch.constexprs()
    if name == "saved":
        return int(values["SAVE"])
    if launch.kernel == "route" and name == "experts":
        return 2
    if launch.kernel != "down":
        return 1
    return 0 if name == "experts" and values["ATOMIC"] else 2 if name == "slots" and values["FUSED"] else 1


def least_bytes(load: Load, sorted_pairs: bool) -> int:
    """The bytes of the fused algorithm itself: what is read once and written once with nothing beside it.

    Parameters of the experts that are hit, the router's matrix, x and y once; h once written and read; and, where pairs
    are sorted by expert and each token's results are added in the order of its slots, a row a pair written and read.
    """
    s, e = load.sizes, load.spec.experts
    each, wide = STORED[e.dtype].itemsize, STORED[load.spec.y_dtype].itemsize
    router = s.E * s.H * each if load.spec.router else 0
    rows = load.rows * ((s.F if e.out else 0) + (s.O if sorted_pairs else 0))
    return sum(map(load.param_bytes, e.param_groups)) + router + s.T * (s.H * each + s.O * wide) + 2 * rows * each
