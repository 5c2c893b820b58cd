"""Loads of experts: how many rows each expert of a layer got in each batch, as JSON lines and in a few figures.

One line a layer: {"site": str, "tokens": int, "k": int, "experts": int, "batches": [[rows of expert 0, …], …]}.
`tokens` counts the tokens of all batches together; a batch's own tokens are sum(batch) / k. Where the router's weight
was seen, "angles" holds what `moec.sizing.angles.Angles` says of it. Where they were asked for, "choices" holds the
experts of some tokens: [[expert, …], …].
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moec.errors import ParseError
from moec.sizing.angles import Angles


@dataclass(frozen=True)
class Load:
    """One layer's recorded loads. Letters: E experts, k experts a token."""

    site: str
    tokens: int
    k: int
    experts: int
    batches: tuple[tuple[int, ...], ...]
    angles: Angles | None = None
    choices: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.k < 1 or self.experts < 1:
            raise ParseError(f"load of {self.site!r}: k={self.k}, experts={self.experts}, expected at least 1")
        if any(len(batch) != self.experts for batch in self.batches):
            raise ParseError(f"load of {self.site!r}: a batch has not one count for each of {self.experts} experts")
        if any(expert >= self.experts for chosen in self.choices for expert in chosen):
            raise ParseError(f"load of {self.site!r}: a choice of an expert that is none of {self.experts}")

    @property
    def total(self) -> tuple[int, ...]:
        """Rows of each expert over all batches [E]."""
        return tuple(map(sum, zip(*self.batches, strict=True))) if self.batches else (0,) * self.experts

    @property
    def imbalance(self) -> float:
        """Largest load over the mean load, in the worst batch; 1 is even, E is all rows to one expert."""
        worst = [max(batch) * self.experts / sum(batch) for batch in self.batches if sum(batch)]
        return max(worst, default=1.0)

    @property
    def entropy(self) -> float:
        """Entropy of the loads over that of even loads: 1 is even, 0 is one expert."""
        rows = sum(self.total)
        if not rows or self.experts == 1:
            return 1.0
        shares = [count / rows for count in self.total if count]
        return -sum(p * math.log(p) for p in shares) / math.log(self.experts)

    @property
    def idle(self) -> float:
        """Mean number of experts without a row in a batch."""
        return sum(batch.count(0) for batch in self.batches) / max(len(self.batches), 1)


def write_loads(loads: Iterable[Load], path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(load_data(load)) + "\n" for load in loads), encoding="utf-8")


def load_data(load: Load) -> dict[str, Any]:
    """The fields of one line; no angles and no choices where none were recorded."""
    return {name: value for name, value in asdict(load).items() if value is not None and value != ()}


def read_loads(path: Path) -> tuple[Load, ...]:
    """What `write_loads` wrote; raises ParseError, whose text names the line."""
    found: list[Load] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(_load(json.loads(line)))
        except (ValueError, KeyError, TypeError, ParseError) as error:
            raise ParseError(f"{path}:{number}: not a line of loads: {error}") from error
    return tuple(found)


def _load(data: dict[str, Any]) -> Load:
    batches = tuple(tuple(int(count) for count in batch) for batch in data["batches"])
    angles = Angles.parse(data["angles"]) if "angles" in data else None
    choices = tuple(tuple(int(expert) for expert in chosen) for chosen in data.get("choices", ()))
    return Load(str(data["site"]), int(data["tokens"]), int(data["k"]), int(data["experts"]), batches, angles, choices)
