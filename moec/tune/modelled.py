"""`moec tune --target GPU` without that GPU: candidates ranked by prior and model and compiled, nothing measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from moec.codegen.cost_model import seconds, uniform_histogram
from moec.codegen.plan import Sizes
from moec.codegen.triton_config import GpuConfig
from moec.codegen.triton_schedule import candidates
from moec.gpu.offline import Refused, compile_offline
from moec.gpu.target import GpuTarget
from moec.ir.spec import KernelSpec
from moec.kernels.jobs import Request, kernel_jobs
from moec.view.fitting import FittingTable

MARK = "modelled, not measured"
_PRODUCTS = ("gate_up", "down", "decode_gate_up", "decode_route_gate_up", "decode_down")


@dataclass(frozen=True)
class Candidate:
    """One configuration: its modelled microseconds, and what the compiler made of its grouped products.

    problems is None where the budget ended before it was compiled, empty where nothing is wrong.
    """

    config: GpuConfig
    micros: float
    registers: int
    per_step: tuple[float, ...]
    problems: tuple[str, ...] | None


@dataclass(frozen=True)
class Ranking:
    """The candidates of one layer at one number of tokens in the model's order, the default first."""

    spec: str
    sizes: Sizes
    target: str
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The first that compiles with nothing wrong, the default before others; the default where none does."""
        return next((c for c in self.candidates if c.problems == ()), self.candidates[0])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        best = asdict(self.best.config)
        return {**asdict(self), "best": best, "how": MARK}


def rank_offline(
    spec: KernelSpec,
    sizes: Sizes,
    target: GpuTarget,
    budget: float,
    cache_dir: Path,
    progress: Callable[[float, int], None] = lambda spent, compiled: None,
) -> Ranking:
    """Rank the candidates and compile them, in that order, for `budget` seconds; the default in any case."""
    configs = candidates(spec, sizes, target)
    times = seconds(
        configs, sizes, uniform_histogram(sizes), target, spec.experts.dtype, projections=spec.experts.ab_views
    )
    start, found = time.perf_counter(), list[Candidate]()
    for config, modelled in zip(configs, times, strict=True):
        spent = time.perf_counter() - start
        late = bool(found) and spent >= budget
        made = (0, (), None) if late else _compiled(spec, sizes, target, config, cache_dir)
        found.append(Candidate(config, round(1e6 * float(modelled), 3), *made))
        progress(spent, len(found))
    return Ranking(str(spec), sizes, target.name, tuple(found))


def _compiled(
    spec: KernelSpec, sizes: Sizes, target: GpuTarget, config: GpuConfig, cache_dir: Path
) -> tuple[int, tuple[float, ...], tuple[str, ...]]:
    """(most registers, instructions a step of each product, what is wrong) of the grouped products."""
    values = tuple((f.name, getattr(config, f.name)) for f in fields(GpuConfig))
    registers, steps, problems = 0, list[float](), list[str]()
    for one in kernel_jobs(Request(spec, sizes, target, values)):
        if one.launch.kernel not in _PRODUCTS:
            continue
        made = compile_offline(one.job, target, cache_dir)
        if isinstance(made, Refused):
            problems.append(f"{one.launch.kernel}: refused: {made.reason[:90]}")
            continue
        registers = max(registers, made.figures.registers)
        steps += [made.figures.loop.per_step] if made.figures.loop else []
        problems += [f"{one.launch.kernel}: {problem}" for problem in made.figures.problems]
        if config.specialized and not made.figures.specialized:
            problems.append(f"{one.launch.kernel}: warps are not specialized")
    return registers, tuple(steps), tuple(problems)


def ranking_table(rankings: Sequence[Ranking]) -> Table:
    """A row a candidate; * marks the one that would be taken."""
    table = FittingTable(box=box.SIMPLE, title=MARK)
    for name in ("layer", "T", "", "configuration", "model, µs", "registers", "instr/step", "what is wrong"):
        table.add_column(name, justify="right" if name in ("T", "model, µs", "registers") else "left")
    for ranking in rankings:
        s = ranking.sizes
        for i, each in enumerate(ranking.candidates):
            layer = f"H={s.H} F={s.F} E={s.E} k={s.k} on {ranking.target}" if i == 0 else ""
            wrong = "not compiled" if each.problems is None else "; ".join(each.problems)
            steps = ", ".join(f"{step:g}" for step in each.per_step)
            mark = "*" if each is ranking.best else ""
            text = config_text(each.config) + (" (default)" if i == 0 else "")
            table.add_row(layer, str(s.T), mark, text, f"{each.micros:.1f}", str(each.registers), steps, wrong)
    return table


def config_text(config: GpuConfig) -> str:
    """`16x128x64 w4 s4 descriptors programs=132`."""
    how = [config.variant] if config.variant != "sorted" else []
    how += [config.weights] if config.weights != "pointers" else []
    how += [f"programs={config.programs}"] if config.programs else []
    how += ["specialized"] if config.specialized else []
    tile = f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"
    return " ".join([tile, *how])
