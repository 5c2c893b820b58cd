"""What `moec tune` finds within a budget, beside the best of all tunings that there are.

    python benchmarks/tuner.py                                   # layers A and B, T = 1, 64 and 512, 60 s each
    python benchmarks/tuner.py --layers tiny --tokens 7 --budget 1 --turns 1

For each layer and number of tokens: the tuner runs with an empty cache; then every tuning is measured in turns, also
those that the tuner's model rules out, and the fastest few once more, often; in the end the tuner's winner, the best
of them and the default are measured side by side. `found` is the best one's time over the winner's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from common import LAYERS, RESULTS, check_names, write_json
from rich.console import Console
from rich.progress import track

from moec.codegen.tuning import Sizes, candidates
from moec.compare.measure import Timing, environment_line, interleaved
from moec.compare.view import plain_table
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.target import Target
from moec.tune.run import tune
from moec.tune.worker import Bench, Job

FINALISTS = 12  # tunings that are measured often


@dataclass(frozen=True)
class Found:
    """One layer at one number of tokens: the tuner's winner, the best of `tried` tunings, and the default."""

    layer: str
    tokens: int
    seconds: float
    tried: int
    winner: str
    best: str
    winner_time: Timing
    best_time: Timing
    default_time: Timing

    @property
    def share(self) -> float:
        """The best one's time over the winner's; 1 where the tuner found it."""
        return self.best_time.median / self.winner_time.median


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="A,B", help=f"of {LAYERS}")
    parser.add_argument("--tokens", default="1,64,512")
    parser.add_argument("--dtypes", default="f32", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--budget", type=float, default=60.0, help="the tuner's seconds of measuring")
    parser.add_argument("--turns", type=int, default=3, help="measurements of every tuning")
    parser.add_argument("--last", type=int, default=15, help="measurements of the last few, and in the end")
    parser.add_argument("--out", type=Path, default=RESULTS / "tuner.json")
    asked = parser.parse_args(arguments)
    check_names(parser, asked, layers=LAYERS, dtypes=DTYPES)
    return asked


@contextmanager
def empty_cache() -> Generator[None]:
    """What is found goes into a cache of its own, which is thrown away; built kernels too."""
    before = os.environ.get("MOEC_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOEC_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["MOEC_CACHE_DIR"]
            else:
                os.environ["MOEC_CACHE_DIR"] = before


def timed(bench: Bench, texts: Sequence[str], turns: int) -> dict[str, Timing]:
    """Each tuning's time, taken in turns."""
    calls: dict[str, Callable[[], float]] = {text: partial(bench.measure, text) for text in texts}
    return interleaved(calls, turns, float("inf"))


def exhaustive(bench: Bench, texts: Sequence[str], turns: int, last: int, title: str) -> str:
    """The fastest of all tunings: each is measured `turns` times, the finalists `last` times."""
    taken: dict[str, list[float]] = {text: [] for text in texts}
    for _ in track(range(turns), description=title, console=Console(stderr=True), transient=True):
        for text in texts:
            taken[text].append(bench.measure(text))
    finalists = sorted(taken, key=lambda text: min(taken[text]))[:FINALISTS]
    times = timed(bench, finalists, last)
    return min(times, key=lambda text: times[text].median)


def measure(name: str, dtype: str, tokens: int, asked: argparse.Namespace) -> Found:
    """The tuner, then all tunings, then the two winners and the default side by side."""
    shape = LAYERS[name]
    spec, sizes = KernelSpec(ExpertsSpec(dtype)), Sizes(tokens, shape.hidden, shape.width, shape.experts, shape.top_k)
    job, target = Job(str(spec), sizes, torch.get_num_threads()), Target.host()
    everything = candidates(spec, sizes, target, job.threads, limit=1 << 30, slowest=float("inf"))
    texts = [str(tuning) for tuning in everything]
    with empty_cache():
        entry = tune(job, asked.budget).entry
        bench = Bench(job)
        winner = str(entry.tuning or everything[0])
        best = exhaustive(bench, texts, asked.turns, asked.last, f"{name} {dtype} T={tokens}")
        end = timed(bench, list(dict.fromkeys((winner, best, texts[0]))), 2 * asked.last)
    return Found(name, tokens, asked.budget, len(texts), winner, best, end[winner], end[best], end[texts[0]])


def show(console: Console, title: str, rows: Sequence[Found]) -> None:
    """One line a layer and number of tokens."""
    table = plain_table(title)
    for head in ("layer", "tokens", "tunings", "tuner's ms", "best ms", "default ms", "found"):
        table.add_column(head, justify="left" if head == "layer" else "right")
    for r in rows:
        times = (f"{t.median:.3f}" for t in (r.winner_time, r.best_time, r.default_time))
        table.add_row(r.layer, str(r.tokens), str(r.tried), *times, f"{100 * r.share:.0f} %")
    console.print(table)


def cells(asked: argparse.Namespace) -> Iterator[tuple[str, Found]]:
    """What is asked for, measured one after the other, each with its dtype."""
    for dtype in asked.dtypes.split(","):
        for name in asked.layers.split(","):
            for tokens in map(int, asked.tokens.split(",")):
                yield dtype, measure(name, dtype, tokens, asked)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write JSON after each cell, so that nothing is lost; then print a table a dtype."""
    asked = parse(arguments)
    console, say = Console(), Console(stderr=True, highlight=False)
    console.print(environment_line(), highlight=False)
    found: list[tuple[str, Found]] = []
    with torch.no_grad():
        for dtype, row in cells(asked):
            found.append((dtype, row))
            rows = [{"dtype": dtype, **asdict(row), "found": row.share} for dtype, row in found]
            path = write_json("tuner", {"rows": rows}, asked.out)
            say.print(f"{row.layer} {dtype} T={row.tokens}: {100 * row.share:.0f} %, written to {path}")
    for dtype in dict.fromkeys(dtype for dtype, _ in found):
        show(console, f"{dtype}, a budget of {asked.budget:g} s", [row for of, row in found if of == dtype])


if __name__ == "__main__":
    main()
