"""Which tiles tuners elsewhere found fastest, by rows an expert: a small table of counts, and how it joins the model.

The counts (tile_prior.json) are statistics of tuning results that vLLM 0.33.0 and SGLang 0.5.23 (both Apache-2.0)
publish, made by `python benchmarks/cost_model_check.py --write-prior`: for each chip and each power of two of rows an
expert, how often a tile won. No configuration of theirs is copied: tile, chip and rows are all that is counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moec.codegen import cost_model
from moec.codegen.plan import Sizes
from moec.codegen.triton_config import GpuConfig
from moec.gpu.target import GpuTarget

Tile = tuple[int, int, int]
Counts = Mapping[str, Mapping[int, Mapping[Tile, int]]]  # chip → log2 of rows an expert, rounded → tile → wins
_LEAST, _MOST = -4, 10


@dataclass(frozen=True)
class Mix:
    """How counts and model are joined: score = ln(share of wins) − trust · ln(time / least time).

    width   octaves of rows an expert over which counts are spread (Gaussian)
    others  weight of a win on another chip of the same backend
    trust   how much the model's time counts; 0: not at all
    floor   wins that a tile has without having won
    """

    width: float = 1.0
    others: float = 0.2
    trust: float = 5.0
    floor: float = 0.05


def bucket(T: int, k: int, E: int) -> int:
    """The power of two nearest to the mean rows an expert."""
    return max(_LEAST, min(_MOST, round(math.log2(T * k / E))))


def shares(
    counts: Counts, chip: str, backend: Mapping[str, str], rows: float, tiles: Sequence[Tile], mix: Mix
) -> NDArray[np.float64]:
    """Each tile's share of wins at `rows` rows an expert, spread over neighbouring sizes and other chips."""
    at = max(_LEAST, min(_MOST, math.log2(rows)))
    wins = dict.fromkeys(tiles, mix.floor)
    for name, buckets in counts.items():
        weight = 1.0 if name == chip else mix.others * (backend.get(name) == backend.get(chip))
        for place, won in buckets.items() if weight else ():
            near = weight * math.exp(-(((place - at) / mix.width) ** 2))
            for tile, count in won.items():
                if tile in wins:
                    wins[tile] += near * count
    values = np.asarray([wins[tile] for tile in tiles], np.float64)
    return values / values.sum()


@lru_cache(maxsize=1)
def shipped() -> tuple[Counts, Mapping[str, Mix]]:
    """The counts that come with moec, and how each chip's join the model."""
    data = json.loads(Path(__file__).with_name("tile_prior.json").read_text())
    counts = {
        chip: {int(place): {_tile(name): n for name, n in won.items()} for place, won in buckets.items()}
        for chip, buckets in data["wins"].items()
    }
    return counts, {chip: Mix(**values) for chip, values in data["mixes"].items()}


def _tile(name: str) -> Tile:
    m, n, k = map(int, name.split("x"))
    return m, n, k


def as_json(counts: Counts, mixes: Mapping[str, Mix], origin: str) -> str:
    """The table's file: a line for each chip and size."""
    wins = {chip: {str(at): _named(won) for at, won in sorted(own.items())} for chip, own in sorted(counts.items())}
    data = {"origin": origin, "mixes": {chip: asdict(mix) for chip, mix in sorted(mixes.items())}, "wins": wins}
    return json.dumps(data, separators=(",", ":")).replace("},", "},\n").replace('":{"', '":\n{"') + "\n"


def _named(won: Mapping[Tile, int]) -> dict[str, int]:
    return {"x".join(map(str, tile)): n for tile, n in sorted(won.items())}


# The chips that counts exist for, and what they run on; the chip whose counts stand in for a target's own.
_BACKENDS = {
    "h100": "cuda", "h200": "cuda", "a100": "cuda", "b200": "cuda", "h20": "cuda", "mi300x": "hip", "mi325x": "hip"
}  # fmt: skip
_CHIPS = {"sm_80": "a100", "sm_86": "a100", "sm_89": "a100", "sm_90": "h100", "sm_100": "b200", "gfx942": "mi300x"}


_NEAREST = {"cuda": "a100", "hip": "mi300x"}


def rank_with_prior(
    configs: Sequence[GpuConfig],
    sizes: Sizes,
    histogram: Sequence[int],
    target: GpuTarget,
    dtype: str = "bf16",
    mix: Mix | None = None,
) -> list[tuple[GpuConfig, float]]:
    """(configuration, score), best first: tiles by shares of wins and modelled time, each tile's own by time alone.

    Configurations that cannot run are left out. A chip without counts of its own takes those of the nearest chip.
    `mix`: how the two are joined, where it shall not be as fitted for the chip.
    """
    times = cost_model.seconds(configs, sizes, histogram, target, dtype)
    running = [(c, t) for c, t in zip(configs, times, strict=True) if math.isfinite(t)]
    fastest: dict[Tile, float] = {}
    for config, time in running:
        fastest[cost_model.tile_of(config)] = min(time, fastest.get(cost_model.tile_of(config), math.inf))
    tiles = sorted(fastest)
    counts, mixes = shipped()
    chip = target.name if target.name in counts else _CHIPS.get(target.name, _NEAREST[target.backend])
    mix = mix or mixes[chip]
    share = shares(counts, chip, _BACKENDS, max(1, sum(histogram)) / sizes.E, tiles, mix)
    least = min(fastest.values(), default=1.0)
    score = {t: math.log(share[i]) - mix.trust * math.log(fastest[t] / least) for i, t in enumerate(tiles)}
    order = sorted(running, key=lambda pair: (-score[cost_model.tile_of(pair[0])], pair[1]))
    return [(config, score[cost_model.tile_of(config)]) for config, _ in order]
