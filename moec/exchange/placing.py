"""Experts that are chosen together on one rank: a graph partition by co-activation with a cap on loads.

Experts are nodes, how often two are chosen by one token is the weight of their edge. A rank gets as many experts as in
blocks and at most `slack` more rows than the mean; within that, the weight between ranks is made small: clusters grow
along a maximum spanning forest, are packed, and pairs of experts are swapped while that gains.
Letters: E experts, k experts a token, N recorded tokens, P parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from moec.errors import ParseError
from moec.exchange.placement import Placement

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def together(choices: Sequence[Sequence[int]], experts: int) -> Floats:
    """choices[N, k] → how many tokens chose both of two experts [E, E], with zeros on the diagonal; -1 is no choice."""
    chosen = np.zeros((len(choices), experts))
    for token, picked in enumerate(choices):
        chosen[token, [e for e in picked if 0 <= e < experts]] = 1
    counts = chosen.T @ chosen
    np.fill_diagonal(counts, 0)
    return counts


def place(
    weights: Floats, loads: Sequence[float], ranks: int, ranks_per_node: int = 0, slack: float = 0.1
) -> Placement:
    """weights[E, E] as of `together`, loads[E] rows of each expert → a placement.

    Nodes first, where ranks have nodes, then ranks inside each. Raises ParseError where sizes do not fit. A load that
    no division can keep under the cap (one expert with more than a rank's share) is kept as low as swaps bring it.
    """
    experts, size = len(loads), ranks_per_node or ranks
    if weights.shape != (experts, experts) or ranks % size:
        raise ParseError(f"weights {weights.shape} of {experts} experts, {ranks} ranks in nodes of {size}")
    held = Placement.blocks(experts, ranks).held
    rows = np.asarray(loads, dtype=np.float64)
    nodes = [held[at : at + size] for at in range(0, ranks, size)]
    node = partition(weights, rows, [sum(node) for node in nodes], slack)
    owners = np.zeros(experts, dtype=np.int64)
    for number, each in enumerate(nodes):
        inside = np.flatnonzero(node == number)
        owners[inside] = number * size + partition(weights[np.ix_(inside, inside)], rows[inside], each, slack)
    return Placement(tuple(int(rank) for rank in owners), ranks)


def partition(weights: Floats, rows: Floats, sizes: Sequence[int], slack: float) -> Ints:
    """The part of each expert, parts having exactly `sizes`; the cap on rows is by a part's share of the experts."""
    if len(rows) == 0 or len(sizes) == 1:
        return np.zeros(len(rows), dtype=np.int64)
    share = np.asarray(sizes) / max(sum(sizes), 1)
    caps = np.maximum((1 + slack) * rows.sum() * share, 0)
    part = _packed(_clusters(weights, rows, max(sizes), float(caps.max())), rows, sizes)
    return _swapped(part, weights, rows, caps)


def _clusters(weights: Floats, rows: Floats, size: int, cap: float) -> list[list[int]]:
    """Experts joined along the heaviest edges while a cluster fits a part."""
    graph: Any = nx.Graph()
    graph.add_nodes_from(range(len(rows)))
    first, second = np.nonzero(np.triu(weights))
    graph.add_weighted_edges_from(zip(first.tolist(), second.tolist(), weights[first, second].tolist(), strict=True))
    edges = nx.maximum_spanning_edges(graph, algorithm="kruskal", data=True)
    found = {e: [e] for e in range(len(rows))}
    for a, b, _ in sorted(edges, key=lambda edge: (-edge[2]["weight"], edge[0], edge[1])):
        one, other = found[a], found[b]
        if len(one) + len(other) <= size and rows[one + other].sum() <= cap:
            one.extend(other)
            found.update(dict.fromkeys(other, one))
    return list({id(cluster): cluster for cluster in found.values()}.values())


def _packed(clusters: list[list[int]], rows: Floats, sizes: Sequence[int]) -> Ints:
    """Whole clusters, the largest first, each in the part with the fewest rows that has room; else one by one."""
    part, room, load = np.zeros(len(rows), dtype=np.int64), list(sizes), [0.0] * len(sizes)
    alone: list[list[int]] = []

    def put(cluster: list[int]) -> bool:
        fits = [p for p, left in enumerate(room) if left >= len(cluster)]
        if fits:
            best = min(fits, key=lambda p: (load[p], p))
            part[cluster], room[best], load[best] = best, room[best] - len(cluster), load[best] + rows[cluster].sum()
        return bool(fits)

    for cluster in sorted(clusters, key=lambda c: (-len(c), -rows[c].sum(), c[0])):
        if not put(cluster):
            alone += [[e] for e in cluster]
    for single in sorted(alone, key=lambda c: -rows[c[0]]):
        put(single)
    return part


def _swapped(part: Ints, weights: Floats, rows: Floats, caps: Floats) -> Ints:
    """Pairs exchanged, the best first, while rows over a cap or else the weight between parts become less."""
    heavy = 2 * weights.sum() + 1
    while True:
        inside = np.eye(len(caps))[part]
        linked = weights @ inside  # of each expert to each part [E, P]
        load = rows @ inside
        own = linked[np.arange(len(part)), part]
        there = linked[:, part]  # of expert a to the part of expert b [E, E]
        gain = there + there.T - own[:, None] - own[None, :] - 2 * weights
        moved = rows[None, :] - rows[:, None]  # what the part of a gets when a and b change places
        over = np.maximum(load - caps, 0)[part]
        after = np.maximum((load - caps)[part][:, None] + moved, 0)
        gain += heavy * (over[:, None] + over[None, :] - after - after.T)
        gain[part[:, None] == part[None, :]] = 0
        a, b = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[a, b] <= 1e-9 * heavy:
            return part
        part[[a, b]] = part[[b, a]]
