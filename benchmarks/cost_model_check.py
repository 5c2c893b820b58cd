"""How often is a tuned tile among the first eight of the cost model, of a popularity table, and of both together?

Truth: tile sizes that tuners of vLLM and SGLang found fastest on real GPUs (benchmarks/tuned.py fetches them, 400 MB).
A shape (E, N) with all its files, of both projects and every device, lies in one half; what is fitted on one half is
judged on the other, both ways. The model's constants are fitted on nothing.
"""

import argparse
import hashlib
import math
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import tuned

from moec.codegen import cost_model, tile_prior
from moec.codegen.plan import Sizes
from moec.codegen.tile_prior import Mix
from moec.codegen.triton_config import GpuConfig
from moec.gpu.target import gpu_target
from moec.options import Environment

AIMED = ("h100", "h200", "a100")
BACKENDS = {device: gpu_target(device).backend for device in sorted(set(tuned.DEVICES.values()))}
SPACE = tuple(
    GpuConfig(m, n, k, g, warps, stages)
    for m in (16, 32, 64, 128, 256)
    for n in (32, 64, 128, 256)
    for k in (64, 128, 256)
    for g in (1, 16)
    for warps in (4, 8)
    for stages in (2, 3, 4, 5)
)
TILES = tuple(sorted({cost_model.tile_of(c) for c in SPACE}))
INDEX = {tile: i for i, tile in enumerate(TILES)}
OF_SPACE = np.asarray([INDEX[cost_model.tile_of(c)] for c in SPACE])
GRID = tuple(Mix(w, o, t) for w in (0.4, 0.7, 1.0, 1.5) for o in (0.0, 0.1, 0.3) for t in (0.0, 2.0, 5.0, 10.0))
FIRST = 8


def half_of(result, parts=2, salt=""):
    """The part that a result's shape lies in."""
    return int(hashlib.sha256(f"{salt}{result.E},{result.F}".encode()).hexdigest(), 16) % parts


def tile_seconds(result, seen):
    """The modelled time of each tile at its best warps, stages and grouping."""
    key = (result.device, result.E, result.F, result.H, result.k, result.T)
    if key not in seen:
        sizes = Sizes(result.T, result.H, result.F, result.E, result.k)
        histogram = cost_model.uniform_histogram(sizes)
        times = cost_model.seconds(SPACE, sizes, histogram, gpu_target(result.device))
        best = np.full(len(TILES), np.inf)
        np.minimum.at(best, OF_SPACE, times)
        seen[key] = np.log(best / best.min())
    return seen[key]


def count(results):
    """Wins by device, bucket and tile."""
    wins = defaultdict(lambda: defaultdict(Counter))
    for r in results:
        wins[r.device][tile_prior.bucket(r.T, r.k, r.E)][r.tile] += 1
    return wins


def popular(wins, result):
    """The baseline: wins at this power of two of rows an expert on this device; others only where those are equal."""
    at, buckets = tile_prior.bucket(result.T, result.k, result.E), wins.get(result.device, {})
    score = np.zeros(len(TILES))
    for place, won in buckets.items():
        for tile, n in won.items():
            score[INDEX[tile]] += n * 1e-3 ** abs(place - at)
    return score


def joined(wins, result, slow, mix):
    """Prior and model together."""
    share = tile_prior.shares(wins, result.device, BACKENDS, result.T * result.k / result.E, TILES, mix)
    return np.log(share) - (mix.trust * slow if mix.trust else 0.0)


def place(score, result):
    """How many tiles come before the tuned one."""
    order = np.argsort(-score, kind="stable")
    return int(np.flatnonzero(order == INDEX[result.tile])[0])


def fit(results, slow):
    """The mix of each device that does best on these results alone, in four folds of shapes."""
    hits = defaultdict(Counter)
    for fold in range(4):
        wins = count([r for r in results if half_of(r, 4, "fold") != fold])
        for r in (r for r in results if half_of(r, 4, "fold") == fold):
            for mix in GRID:
                hits[r.device][mix] += place(joined(wins, r, slow[r], mix), r) < FIRST
    return {
        device: Mix(*(best_mean(own, name) for name in ("width", "others", "trust"))) for device, own in hits.items()
    }


def best_mean(hits, name):
    """The value of one setting whose configurations hit most on average: steadier than the single best."""
    by_value = defaultdict(list)
    for mix, n in hits.items():
        by_value[getattr(mix, name)].append(n)
    return max(by_value, key=lambda value: sum(by_value[value]) / len(by_value[value]))


def judge(results, slow):
    """Places by (device, way) of every result, each judged by what the other half taught; and the two mixes."""
    places, mixes = defaultdict(list), []
    for part in (0, 1):
        learnt = [r for r in results if half_of(r) != part]
        wins, mix = count(learnt), fit(learnt, slow)
        mixes.append(mix)
        for r in (r for r in results if half_of(r) == part):
            own = mix[r.device]
            spread = joined(wins, r, slow[r], replace(own, trust=0.0))
            both = joined(wins, r, slow[r], own)
            ways = {"model": -slow[r], "popularity": popular(wins, r), "spread": spread, "both": both}
            for way, score in ways.items():
                places[r.device, part, way].append(place(score, r))
    return places, mixes


def leave_one_out(results, slow, mixes):
    """The same with all other shapes as teachers; not all other files, as the projects copy each other's."""
    places = defaultdict(list)
    by_shape = defaultdict(list)
    for r in results:
        by_shape[r.E, r.F].append(r)
    for shape, own in by_shape.items():
        wins = count([r for r in results if shape != (r.E, r.F)])
        for r in own:
            places[r.device, "popularity"].append(place(popular(wins, r), r))
            places[r.device, "both"].append(place(joined(wins, r, slow[r], mixes[half_of(r)][r.device]), r))
    return places


def share(places, first=FIRST):
    return 100.0 * sum(p < first for p in places) / len(places) if places else math.nan


def table(results, slow):
    """The lines of docs/cost_model.md's table, and whether the aim is met."""
    places, mixes = judge(results, slow)
    lone = leave_one_out(results, slow, mixes)
    lines = [
        "| GPU | half judged | results | files | model | popularity | spread | both | both, first 1 / 5 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    met = {r.device for r in results}.issuperset(AIMED)
    for device in sorted({r.device for r in results}, key=lambda d: (d not in AIMED, d)):
        for part in (0, 1):
            ways = [places[device, part, way] for way in ("model", "popularity", "spread", "both")]
            _, popularity, _, both = ways
            files = len({r.file for r in results if r.device == device and half_of(r) == part})
            shown = " | ".join(f"{share(p):.1f} %" for p in ways)
            fewer = f"{share(both, 1):.0f} % / {share(both, 5):.0f} %"
            lines.append(f"| {device} | {'AB'[part]} | {len(both)} | {files} | {shown} | {fewer} |")
            if device in AIMED:
                met = met and share(both) >= max(80.0, share(popularity))
        shown = f"| – | {share(lone[device, 'popularity']):.1f} % | – | {share(lone[device, 'both']):.1f} % |"
        files = len({r.file for r in results if r.device == device})
        lines.append(f"| {device} | leave one shape out | {len(lone[device, 'both'])} | {files} {shown} |")
    lines += ["", "| settings fitted on the other half | width | others | trust |", "|---|---|---|---|"]
    for part, mix in enumerate(mixes):
        lines += [
            f"| {d}, half {'AB'[part]} judged | {m.width} | {m.others} | {m.trust} |" for d, m in sorted(mix.items())
        ]
    return lines, met


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Environment.read().cache_dir / "tuned", help="folder for wheels")
    parser.add_argument("--write-prior", action="store_true", help="write codegen/tile_prior.json from all results")
    args = parser.parse_args()
    results = [r for r in tuned.read(tuned.fetch(args.cache)) if r.tile in INDEX]
    seen = {}
    slow = {r: tile_seconds(r, seen) for r in results}
    if args.write_prior:
        path = Path(tile_prior.__file__).with_name("tile_prior.json")
        path.write_text(tile_prior.as_json(count(results), fit(results, slow), " ".join(tuned.WHEELS)))
        print(f"wrote {path}: {len(results)} results")
        return 0
    lines, met = table(results, slow)
    print("\n".join(lines))
    print(f"at least 80 % and not below popularity on both halves of {', '.join(AIMED)}: {'yes' if met else 'no'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
