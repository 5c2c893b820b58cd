"""What an exchange of rows costs, as a model: rows and bytes that cross ranks and nodes, for one token of any rank.

Tokens are on every rank alike, so a row to some rank stays where it is with probability 1/R. A choice of k experts is
either one that was recorded, or of the most random kind that gives experts their loads: the probability of a set of k
experts is the product of its experts' odds (conditional Poisson sampling), fitted to the loads. With even loads that
is every set alike. Letters: E experts, k experts a token, R ranks, L ranks a node, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moec.exchange.placement import Placement

Floats = NDArray[np.float64]
NUMBER = 4
"""Bytes of an expert's number beside a row."""
NEVER, ALWAYS = 1e-9, 1 - 1e-6
"""The least and the largest chance of an expert, between which odds are numbers."""
ROUNDS = 100
"""Steps of the fit of odds to loads."""


@dataclass(frozen=True)
class Rows:
    """Rows a token sends one way: in all that leave its rank, and of these those that cross nodes."""

    ranks: float
    nodes: float


@dataclass(frozen=True)
class Reach:
    """How many ranks and nodes the experts of a token are on, on average, and the busiest rank's rows over the mean."""

    ranks: float
    nodes: float
    busiest: float


def reach(chances: Floats, k: int, placement: Placement, size: int) -> Reach:
    """For tokens that choose k experts, with `chances[E]` to be chosen (they sum to k). size: ranks a node."""
    odds = odds_of(chances, k)
    ranks, nodes = np.asarray(placement.owners), np.asarray(placement.of_nodes(size).owners)
    return Reach(_hit(odds, k, ranks), _hit(odds, k, nodes), _busiest(chances, placement))


def recorded_reach(choices: Sequence[Sequence[int]], placement: Placement, size: int) -> Reach:
    """The same, counted over recorded choices [N, k]; -1 is no choice."""
    owners = placement.owners
    ranks = [{owners[e] for e in chosen if 0 <= e < len(owners)} for chosen in choices]
    nodes = [{rank // size for rank in found} for found in ranks]
    count, chances = max(len(choices), 1), np.zeros(len(owners))
    for chosen in choices:
        chances[[e for e in chosen if 0 <= e < len(owners)]] += 1
    return Reach(sum(map(len, ranks)) / count, sum(map(len, nodes)) / count, _busiest(chances, placement))


def _busiest(chances: Floats, placement: Placement) -> float:
    rows = np.bincount(placement.owners, weights=chances, minlength=placement.ranks)
    return float(rows.max() / rows.mean()) if rows.sum() else 1.0


def chances_of(loads: Sequence[float], k: int) -> Floats:
    """Each expert's chance to be among the k of a token, from its rows; even where none were recorded."""
    rows = np.asarray(loads, dtype=np.float64)
    return np.full(len(rows), k / len(rows)) if rows.sum() == 0 else k * rows / rows.sum()


def odds_of(chances: Floats, k: int) -> Floats:
    """The odds of experts whose sets of k, as likely as the products of their odds, have these chances."""
    wanted = np.clip(chances, NEVER, ALWAYS)
    odds = wanted / (1 - wanted)
    for _ in range(ROUNDS):
        now = np.minimum(_chances(odds, k), 1 - NEVER)
        odds = odds * wanted * (1 - now) / (now * (1 - wanted))
        odds = np.maximum(odds * (k / odds.sum()), NEVER**2)  # a common factor changes nothing but the size of numbers
        if np.allclose(now, wanted, rtol=1e-9, atol=0):
            break
    return odds


def _chances(odds: Floats, k: int) -> Floats:
    """The chance of each expert to be in a set of k: odds_e · e_{k-1}(the others) / e_k(all)."""
    before, after = _prefixes(odds, k), _prefixes(odds[::-1], k)[::-1]
    others = sum(before[:-1, i] * after[1:, k - 1 - i] for i in range(k))
    return odds * others / before[-1, k]


def _prefixes(odds: Floats, k: int) -> Floats:
    """The elementary symmetric polynomials e_0 … e_k of the first n odds, for n = 0 … E [E + 1, k + 1]."""
    table = np.zeros((len(odds) + 1, k + 1))
    table[:, 0] = 1
    for n, value in enumerate(odds):
        table[n + 1, 1:] = table[n, 1:] + value * table[n, :-1]
    return table


def _hit(odds: Floats, k: int, groups: NDArray[np.int64]) -> float:
    """The mean number of groups that a set of k experts meets."""
    whole = _prefixes(odds, k)[-1, k]
    missed = [_prefixes(odds[groups != g], k)[-1, k] / whole for g in np.unique(groups)]
    return float(len(missed) - sum(missed))


def rows_of(found: Reach, k: int, ranks: int, size: int) -> dict[str, Rows]:
    """Rows a token by scheme: one for each choice, for each rank, or for each node and then each rank inside of it."""
    away, over = 1 - 1 / ranks, 1 - size / ranks
    schemes = {"per choice": Rows(k * away, k * over), "per rank": Rows(found.ranks * away, found.ranks * over)}
    if 1 < size < ranks:
        across = found.nodes * over
        schemes["per node"] = Rows(across + found.ranks * (1 - 1 / size), across)
    return schemes


@dataclass(frozen=True)
class RowBytes:
    """Bytes of one row there and back, in a forward pass and in a training step (forward and backward)."""

    forward: int
    step: int

    @staticmethod
    def of(hidden: int, x: int, y: int, weight: int, carried: int, out: int | None = None) -> RowBytes:
        """x, y, weight: bytes of a number of x, of the result, of a routing weight; `carried` choices go with a row.

        `out`: numbers of the result's row; as many as of x's where it is not given.
        """
        result = (hidden if out is None else out) * y
        sent = hidden * x + carried * (NUMBER + weight)
        forward = sent + result
        return RowBytes(forward, forward + sent + result + hidden * x + carried * weight)
