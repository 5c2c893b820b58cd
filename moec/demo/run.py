"""`moec demo`: one real-sized MoE layer, compiled, checked and measured beside eager and Inductor."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from moec.backend import explain
from moec.compare.measure import Ceilings, Layer, environment_line, measure_ceilings
from moec.compare.ways import MOEC, Budget, Row, Way, race
from moec.compare.worker import Built
from moec.demo.check import TOLERANCE, Checked, check, reference, relative_error
from moec.demo.forms import Experts, GatheredExperts, GroupedExperts, MoE, make_moe, with_experts
from moec.ir.dtypes import DTYPES
from moec.report import Report
from moec.tools.typed import DemoSize

REPEATS = 9
SLOWEST_CALL, ONE_COMPILE, ONE_TIMING = 1 / 25, 1 / 4, 1 / 20  # as parts of the budget

# Cheapest to prepare first: when the budget ends, the most expensive ones are what is missing.
ALTERNATIVES: tuple[tuple[str, type[Experts], str], ...] = (
    ("eager loop", Experts, ""),
    ("grouped_mm", GroupedExperts, ""),
    ("Inductor, grouped_mm", GroupedExperts, "inductor"),
    ("Inductor, gathered bmm", GatheredExperts, "inductor"),
    ("Inductor, same loop", Experts, "inductor"),
)


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found."""

    size: DemoSize
    environment: str
    ceilings: Ceilings
    report: Report
    compile_seconds: float
    checked: tuple[Checked, ...]
    rows: tuple[Row, ...]

    @property
    def equal(self) -> bool:
        """The layer was fused and every check held."""
        return self.report.complete and all(c.equal for c in self.checked)

    def to_json(self) -> str:
        """As JSON text."""
        data: dict[str, Any] = {name: getattr(self, name) for name in ("environment", "compile_seconds", "equal")}
        data |= {
            "size": asdict(self.size),
            "ceilings": asdict(self.ceilings),
            "report": self.report.to_dict(texts=False),
        }
        data |= {"checked": [asdict(c) | {"equal": c.equal} for c in self.checked]}
        return json.dumps(data | {"rows": [asdict(r) | {"best": r.best} for r in self.rows]}, indent=2)


def run_demo(size: DemoSize, console: Console) -> DemoResult:
    """Run it, with progress on `console`. After `size.budget` seconds the alternatives that are left are skipped."""
    end = time.monotonic() + size.budget
    dtype = DTYPES[size.dtype]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with torch.no_grad(), Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring this machine", total=4 + len(size.tokens) * (2 + len(ALTERNATIVES)))

        def step(text: str) -> None:
            progress.update(task, advance=1, description=text)

        ceilings = measure_ceilings(dtype)
        step("making the layer")
        model, inputs = layer_and_inputs(size)
        step("compiling with moec")
        start = time.perf_counter()
        report = explain(model, inputs[size.tokens[-1]])
        seconds = time.perf_counter() - start
        step("checking against an fp32 reference and eager")
        layer = Layer(size.hidden, size.width, size.experts, size.top_k, dtype.itemsize)
        slowest = size.budget * SLOWEST_CALL
        checked = check(model, inputs, affordable=lambda t: layer.flops(t) / (ceilings.native * 1e9) < slowest)
        budget = Budget(slowest, size.budget * ONE_COMPILE, size.budget * ONE_TIMING, end, REPEATS, size.budget / 5)
        rows = race(ways(size), inputs, layer, ceilings, lambda x: _active(model, x), budget, step)
    return DemoResult(size, environment_line(), ceilings, report, seconds, checked, rows)


def _active(model: MoE, x: Tensor) -> int:
    """Distinct experts that x hits."""
    return int(model.gate(x).topk(model.top_k).indices.unique().numel())


def layer_and_inputs(size: DemoSize) -> tuple[MoE, dict[int, Tensor]]:
    """The same parameters and inputs in every process."""
    torch.manual_seed(0)
    dtype = DTYPES[size.dtype]
    model = make_moe(size.hidden, size.width, size.experts, size.top_k, dtype)
    return model, {tokens: torch.randn(tokens, size.hidden).to(dtype) for tokens in size.tokens}


def build(size: DemoSize, form: type[Experts], backend: str) -> Built:
    """One way, in its own process; backend '': eager."""
    model, inputs = layer_and_inputs(size)
    module = model if form is Experts else with_experts(model, form)
    call = torch.compile(module, backend=backend) if backend else module

    def wrong(tokens: int, y: Tensor) -> str:
        exact = reference(model, inputs[tokens], model.gate(inputs[tokens]).topk(size.top_k).indices)
        # A token whose choice hangs on rounding may differ here; the check by choice is `check.py`'s, on moec alone.
        error = relative_error(y, exact)
        return "" if error < 10 * TOLERANCE[y.dtype] else f"WRONG: relative error {error:.1e}"

    return Built(call, inputs, wrong)


def ways(size: DemoSize) -> list[Way]:
    """moec first, then the alternatives."""
    others = [
        Way(name, build, (size, form, backend), compiles=bool(backend), gathers=form is GatheredExperts)
        for name, form, backend in ALTERNATIVES
    ]
    return [Way(MOEC, build, (size, Experts, "moec"), compiles=True), *others]
