"""Which rank computes which expert: a frozen value, blocks by default, kept as JSON for a model's layers.

{"ranks": 4, "layers": {"model.layers.3.mlp": [0, 0, 1, 1, 2, 2, 3, 3]}}

Letters: E experts, R ranks of a process group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from moec.errors import ParseError


@dataclass(frozen=True)
class Placement:
    """owners[e] is the rank, 0 to ranks - 1, that computes expert e."""

    owners: tuple[int, ...]
    ranks: int

    def __post_init__(self) -> None:
        """Raises ParseError for a rank that is none."""
        if self.ranks < 1 or not self.owners:
            raise ParseError(
                f"placement of {len(self.owners)} experts on {self.ranks} ranks: expected at least 1 of each"
            )
        wrong = [(e, rank) for e, rank in enumerate(self.owners) if not 0 <= rank < self.ranks]
        if wrong:
            raise ParseError(f"placement: expert {wrong[0][0]} on rank {wrong[0][1]}; ranks are 0 to {self.ranks - 1}")

    @staticmethod
    def blocks(experts: int, ranks: int) -> Placement:
        """Experts in order, in blocks whose sizes differ by 1 at most; with fewer experts than ranks, spread evenly."""
        return Placement(tuple(e * ranks // experts for e in range(experts)), ranks)

    @property
    def experts(self) -> int:
        """E."""
        return len(self.owners)

    @property
    def held(self) -> tuple[int, ...]:
        """How many experts each rank computes [R]."""
        counts = [0] * self.ranks
        for rank in self.owners:
            counts[rank] += 1
        return tuple(counts)

    def of_nodes(self, size: int) -> Placement:
        """The node of each expert, where nodes have `size` ranks each, in order."""
        return Placement(tuple(rank // size for rank in self.owners), -(-self.ranks // size))

    def __str__(self) -> str:
        held = sorted(set(self.held))
        each = str(held[0]) if len(held) == 1 else f"{held[0]} to {held[-1]}"
        kind = "in blocks" if self == Placement.blocks(self.experts, self.ranks) else "as placed"
        return f"{self.experts} experts on {self.ranks} ranks, {each} a rank, {kind}"


@dataclass(frozen=True)
class Placements:
    """The placements of a model's layers by name; a layer that is not named has its experts in blocks."""

    ranks: int
    layers: Mapping[str, Placement] = field(default_factory=dict[str, Placement])

    def of(self, layer: str, experts: int) -> Placement:
        """A layer's placement; raises ParseError where the file's has another number of experts."""
        found = self.layers.get(layer)
        if found is None:
            return Placement.blocks(experts, self.ranks)
        if found.experts != experts:
            raise ParseError(f"the placement of {layer!r} has {found.experts} experts, the layer {experts}")
        return found


def write_placements(placements: Placements, path: Path) -> None:
    """As one JSON object."""
    layers = {name: list(placement.owners) for name, placement in placements.layers.items()}
    path.write_text(json.dumps({"ranks": placements.ranks, "layers": layers}) + "\n", encoding="utf-8")


def read_placements(path: Path) -> Placements:
    """What `write_placements` wrote; raises ParseError, whose text names the file."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        ranks = _whole(data["ranks"])
        layers = cast("dict[str, list[Any]]", data["layers"])
        found = {str(name): Placement(tuple(map(_whole, owners)), ranks) for name, owners in layers.items()}
    except OSError as error:
        raise ParseError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, ParseError) as error:
        why = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ParseError(
            f'{path}: not a file of placements {{"ranks": R, "layers": {{name: [rank, …]}}}}: {why}'
        ) from error
    return Placements(ranks, found)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ParseError(f"{value!r} is not a whole number")
    return value
