"""What `moec tune` found, as a table, as data and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from moec.errors import OptionError
from moec.tune.job import Job
from moec.tune.search import Decision
from moec.view.fitting import FittingTable

Search = tuple[Job, tuple[str, ...], Decision]


@dataclass(frozen=True)
class Row:
    """One search: times in milliseconds, `gain` of the fastest over the default, where the model had ranked it.

    place: 1 is what the model would have taken first; rank: Spearman's correlation of its order with the measured one.
    """

    spec: str
    sizes: str
    T: int
    where: str
    profile: str
    default_ms: float
    best_ms: float
    gain: float
    best: str
    measured: int
    failed: int
    place: int
    rank: float


def row_of(search: Search) -> Row:
    """The figures of a finished search."""
    job, texts, decision = search
    s = job.sizes
    default, best = decision.standing(0), decision.standing(decision.winner)
    ran = [each for each in decision.standings if each.seconds and not each.failed]
    return Row(
        job.spec,
        f"H={s.H} F={s.F} E={s.E} k={s.k}{'' if job.weights == 'stored' else f' weights={job.weights}'}",
        s.T,
        job.device or f"{job.threads} threads",
        job.profile,
        1e3 * default.median,
        1e3 * best.median,
        default.median / best.median if best.seconds else 1.0,
        changes(texts[decision.winner], texts[0]) if decision.winner else "default",
        len(ran),
        sum(bool(each.failed) for each in decision.standings),
        decision.winner,
        rank_correlation([each.candidate for each in ran if each.candidate]),
    )


def changes(text: str, default: str) -> str:
    """The numbers of a tuning that are not the default's."""
    return " ".join(a for a, b in zip(text.split(), default.split(), strict=True) if a != b)


def rank_correlation(order: Sequence[int]) -> float:
    """Spearman's correlation between a measured order of candidates and the order of their numbers; 1: the same."""
    n = len(order)
    if n < 2:
        return 1.0
    modelled = {candidate: i for i, candidate in enumerate(sorted(order))}
    return 1 - 6 * sum((i - modelled[c]) ** 2 for i, c in enumerate(order)) / (n * (n * n - 1))


def report_table(searches: Sequence[Search]) -> Table:
    """One row a search."""
    table = FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("layer", "T", "profile", "default ms", "best ms", "gain", "best", "measured", "model's place", "rank"):
        table.add_column(name, overflow="fold", justify="left" if name in ("layer", "best", "profile") else "right")
    for row in sorted(map(row_of, searches), key=lambda r: (r.spec, r.sizes, r.T)):
        cells = (
            *(f"{row.spec}\n{row.sizes}, {row.where}", str(row.T), row.profile),
            *(f"{row.default_ms:.3g}", f"{row.best_ms:.3g}", f"{row.gain:.2f}x", row.best),
            f"{row.measured}{f' ({row.failed} failed)' if row.failed else ''}",
            *(str(row.place) if row.place else "–", f"{row.rank:.2f}"),
        )
        table.add_row(*map(Text, cells))
    return table


def report_data(searches: Sequence[Search]) -> list[dict[str, Any]]:
    """The same for --json, with every candidate's times."""
    return [
        {
            **asdict(row_of(search)),
            "candidates": [
                {"tuning": search[1][s.candidate], "ms": [1e3 * t for t in s.seconds], "failed": s.failed}
                for s in search[2].standings
            ],
        }
        for search in searches
    ]


def plot(searches: Sequence[Search], path: Path) -> Path:
    """Every candidate's median time relative to the default, one column of dots a search. Raises OptionError."""
    try:
        import matplotlib
    except ImportError:
        raise OptionError("--plot needs matplotlib: pip install 'moec[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(2 + 1.2 * max(len(searches), 3), 4))
    for i, search in enumerate(searches):
        decision, first = search[2], i == 0
        default = decision.standing(0).median
        times = [s.median / default for s in decision.standings if s.seconds and not s.failed]
        axes.scatter([i] * len(times), times, s=14, alpha=0.6, color="tab:gray", label="candidate" if first else None)
        best = decision.standing(decision.winner).median / default
        axes.scatter([i], [best], s=90, marker="D", facecolors="none", edgecolors="tab:green", linewidths=2,
                     label="kept" if first else None)  # fmt: skip
    axes.axhline(1.0, color="tab:blue", linewidth=1, label="default")
    layers = [f"H={s[0].sizes.H} F={s[0].sizes.F}\nE={s[0].sizes.E} k={s[0].sizes.k}" for s in searches]
    axes.set_xticks(
        range(len(searches)),
        [f"T={s[0].sizes.T}\n{s[0].profile}\n{at}".replace("$", r"\$") for s, at in zip(searches, layers, strict=True)],
    )
    axes.set_xlabel("tokens, how they are spread, and the layer")
    axes.set_ylabel("median time ÷ default's (below 1: faster)")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OptionError(f"--plot {path}: cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
    return path
