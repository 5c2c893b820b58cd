"""LocMoE's lower bound on capacity, from the angles between tokens and the gates that accepted them.

"LocMoE: A Low-overhead MoE for Large Language Model Training" (arXiv 2401.13920): where the E gates' weights are
orthogonal and a token is worth its expert when its angle to the gate has a cosine of at least δ, a random direction of
D channels is that near with probability 1 − I_{δ²}(½, (D − 1)/2), so an expert needs, to see one such token,

    ec_min ≥ 1 / (E · (1 − I_{δ²}(½, (D − 1)/2)))  >  exp(δ²·D / (2 − δ²)) / E

rows (I: the regularised incomplete beta function). It bounds what is needed, not how many rows arrive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mpmath

QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Shares of the pairs at or below each recorded cosine."""

NEARLY = 0.1
"""Gates count as orthogonal up to this |cosine|; E random gates of D channels are at about √(2·ln(E²/2)/D)."""


@dataclass(frozen=True)
class Angles:
    """What was measured in one layer.

    channels  D, the router's inputs     pairs  cosines that were measured, one for each choice of an expert
    cosines   between token and the weight of the gate that it chose, at QUANTILES, ascending
    gates     the largest |cosine| between the weights of two gates
    """

    channels: int
    pairs: int
    cosines: tuple[float, ...]
    gates: float

    def __post_init__(self) -> None:
        if self.channels < 2 or len(self.cosines) != len(QUANTILES):
            raise ValueError(f"angles: D={self.channels}, {len(self.cosines)} cosines, expected 2 and {len(QUANTILES)}")

    @property
    def orthogonal(self) -> bool:
        """Whether the bound's precondition holds."""
        return self.gates <= NEARLY

    def delta(self, share: float = 0.0) -> float:
        """δ: the cosine of the largest accepted angle, without the `share` of pairs at the largest angles."""
        at = max(i for i, q in enumerate(QUANTILES) if q <= share)
        return self.cosines[at]

    @staticmethod
    def parse(data: Mapping[str, Any]) -> Angles:
        """The angles of a JSON object; raises KeyError, TypeError or ValueError."""
        cosines = tuple(float(c) for c in data["cosines"])
        return Angles(int(data["channels"]), int(data["pairs"]), cosines, float(data["gates"]))


def least_capacity(experts: int, channels: int, delta: float) -> float:
    """LocMoE's bound in rows; δ ≤ 0 accepts any direction, which leaves 1/E."""
    x = mpmath.mpf(max(delta, 0.0)) ** 2
    if x >= 1:
        return math.inf
    # 1 − I_x(a, b) = I_{1−x}(b, a), without the difference of two numbers near 1.
    near = mpmath.betainc(mpmath.mpf(channels - 1) / 2, mpmath.mpf(1) / 2, 0, 1 - x, regularized=True)
    return float(1 / (experts * near))


def least_capacity_simple(experts: int, channels: int, delta: float) -> float:
    """The exponential below it, in rows, for D ≥ 3."""
    x = mpmath.mpf(max(delta, 0.0)) ** 2
    return float(mpmath.exp(x * channels / (2 - x)) / experts)
