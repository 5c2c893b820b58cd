"""The capacity for a wanted drop rate, from recorded loads, with what it is based on.

A capacity factor f gives each expert of a batch with P pairs C = ⌈f·P/E⌉ rows; what comes later is dropped. The
tokens of a batch are not independent of each other, batches are taken to be: a batch is one sample.
Letters: E experts; a pair is one (token, slot).
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from moec.errors import ParseError
from moec.sizing.loads import Load

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Sized:
    """The least capacity whose observed drop rate is at most `wanted`, and the evidence.

    factor    C = ⌈factor·P/E⌉ for a batch of P pairs        capacity  that of the largest batch recorded
    dropped   share of all recorded pairs beyond it           worst     that share in the worst batch
    covered   share of the loads (one expert, one batch) that fit: the quantile of loads that the capacity is
    over      batches that drop more than wanted, of `batches`
    at_most   with CONFIDENCE, no larger share of batches like these does (exact binomial bound)
    floor     E·C ≥ kept pairs: no capacity factor below this one can reach the rate, however even the loads
    """

    wanted: float
    factor: Fraction
    capacity: int
    largest: int
    batches: int
    tokens: int
    pairs: int
    dropped: float
    worst: float
    covered: float
    over: int
    at_most: float
    floor: float


def capacity_of(factor: Fraction, pairs: int, experts: int) -> int:
    """C = ⌈f·P/E⌉."""
    return math.ceil(factor * pairs / experts)


def dropped_of(batch: Sequence[int], capacity: int) -> int:
    """Pairs of one batch beyond the capacity."""
    return sum(max(0, rows - capacity) for rows in batch)


def size_for(load: Load, wanted: float) -> Sized:
    """The capacity for a drop rate. Raises ParseError for a rate outside [0, 1) or a load without rows."""
    if not 0 <= wanted < 1:
        raise ParseError(f"drop rate {wanted}: expected a share from 0 to less than 1, such as 0.001")
    batches = [batch for batch in load.batches if sum(batch)]
    if not batches:
        raise ParseError(f"the load of {load.site!r} has no rows; record it with `moec routes`")
    pairs = sum(map(sum, batches))
    factor = _least_factor(batches, load.experts, Fraction(wanted) * pairs)
    capacities = [capacity_of(factor, sum(batch), load.experts) for batch in batches]
    lost = [dropped_of(batch, c) for batch, c in zip(batches, capacities, strict=True)]
    rates = [n / sum(batch) for n, batch in zip(lost, batches, strict=True)]
    fits = sum(rows <= c for batch, c in zip(batches, capacities, strict=True) for rows in batch)
    over, largest = sum(rate > wanted for rate in rates), max(map(sum, batches))
    return Sized(
        wanted=wanted,
        factor=factor,
        capacity=capacity_of(factor, largest, load.experts),
        largest=largest,
        batches=len(batches),
        tokens=load.tokens,
        pairs=pairs,
        dropped=sum(lost) / pairs,
        worst=max(rates),
        covered=fits / (len(batches) * load.experts),
        over=over,
        at_most=share_at_most(over, len(batches)),
        floor=1 - wanted,
    )


def _least_factor(batches: Sequence[Sequence[int]], experts: int, allowed: Fraction) -> Fraction:
    """The least factor that makes some batch's f·P/E whole and drops at most `allowed` pairs."""
    longest: Counter[int] = Counter()
    for batch in batches:
        longest[sum(batch)] = max(longest[sum(batch)], *batch)
    steps = sorted({Fraction(c * experts, size) for size, rows in longest.items() for c in range(rows + 1)})

    def enough(factor: Fraction) -> bool:
        return sum(dropped_of(b, capacity_of(factor, sum(b), experts)) for b in batches) <= allowed

    return steps[bisect.bisect_left(steps, True, key=enough)]


def share_at_most(found: int, samples: int, confidence: float = CONFIDENCE) -> float:
    """The Clopper–Pearson upper limit: the share at which `found` or fewer of `samples` become improbable."""
    if found >= samples:
        return 1.0
    low, high = found / samples, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(found, samples, middle) > 1 - confidence else (low, middle)
    return high


def _at_most(found: int, samples: int, p: float) -> float:
    """The probability of at most `found` in `samples` independent trials of probability 0 < p < 1."""
    logs = (
        math.lgamma(samples + 1) - math.lgamma(i + 1) - math.lgamma(samples - i + 1)
        + i * math.log(p) + (samples - i) * math.log1p(-p)
        for i in range(found + 1)
    )  # fmt: skip
    return math.fsum(map(math.exp, logs))
