"""How the rows of one layer travel: the layer, the process group, each expert's rank, ranks a node; text in a graph."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from moec.errors import ParseError
from moec.exchange.placement import Placement


@dataclass(frozen=True)
class Exchange:
    """layer: its name, by which ranks notice that they are not at the same one. group: a process group's name.

    ranks_per_node: rows cross nodes once a node and are spread inside of it; 0: they go straight to their rank.
    """

    layer: str
    group: str
    placement: Placement
    ranks_per_node: int = 0

    def __str__(self) -> str:
        return json.dumps([self.layer, self.group, self.placement.ranks, self.ranks_per_node, *self.placement.owners])

    @staticmethod
    def parse(text: str) -> Exchange:
        """The exchange that prints as `text`; raises ParseError."""
        return _parse(text)

    def targets(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """For each hop, the rank to which rank `rank` sends a row for expert e, by e.

        One hop straight to the expert's rank; or first to the rank of one's own place in the expert's node, then inside
        that node.
        """
        owners, size = self.placement.owners, self.ranks_per_node
        if size in (0, 1, self.placement.ranks):  # every node is one rank, or there is one node
            return (owners,)
        return (tuple(owner // size * size + rank % size for owner in owners), owners)

    @property
    def summary(self) -> str:
        """For people."""
        nodes = f"; rows cross nodes of {self.ranks_per_node} ranks once" if len(self.targets(0)) > 1 else ""
        return f"over {self.group!r}: {self.placement}{nodes}"


@lru_cache(maxsize=1024)
def _parse(text: str) -> Exchange:
    try:
        layer, group, ranks, size, *owners = json.loads(text)
        return Exchange(layer, group, Placement(tuple(owners), ranks), size)
    except (ValueError, TypeError) as error:
        raise ParseError(
            f"exchange {text!r}: expected [layer, group, ranks, ranks a node, owners…]: {error}"
        ) from error
