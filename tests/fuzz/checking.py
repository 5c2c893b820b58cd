"""Compile one sample with moec and judge it: matched and equal, or left alone and equal, and why."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from moec.backend import Backend
from moec.options import Options
from moec.report import Report

TOLERANCE = {"float32": 2e-4, "bfloat16": 6e-2}


class Wrong(AssertionError):
    """moec computed something else than eager, or failed."""


@dataclass
class Summary:
    """What a run saw."""

    modules: int = 0
    fused: int = 0
    supported: int = 0
    supported_fused: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    missing_reason: int = 0
    missing: dict[str, str] = field(default_factory=dict)
    unfused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        share = 100 * self.supported_fused / max(self.supported, 1)
        lines = [
            f"modules {self.modules}, fused {100 * self.fused / max(self.modules, 1):.1f} %, wrong 0",
            f"inside the supported grammar {self.supported}, fused {self.supported_fused} ({share:.1f} %)",
            f"declined without a reason that names a line: {self.missing_reason}",
            *(f"  {n:5d} × {why}" for why, n in self.declined.most_common(25)),
            *(f"no line: {why}\n{source}" for why, source in self.missing.items()),
        ]
        return "\n".join(lines)


def load(source: str, folder: Path) -> nn.Module:
    """The module that `make()` of the source returns; its own file, so that loops can be read."""
    path = Path(tempfile.mkstemp(suffix=".py", prefix="fuzz_", dir=folder)[1])
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
        return module.make()
    finally:
        sys.modules.pop(path.stem)


def outputs(run: Any, model: nn.Module, x: torch.Tensor, training: bool) -> list[torch.Tensor | None]:
    """Outputs; in training also the gradients by the input and every parameter."""
    model.zero_grad()
    x = x.clone().requires_grad_(training)
    with torch.set_grad_enabled(training):
        found = run(x)
        values = list(found) if isinstance(found, tuple) else [found]
        if not training:
            return values
        weight = torch.linspace(-1, 1, values[0].numel(), dtype=values[0].dtype).view_as(values[0])
        sum((v.float().square() * (weight.float() if v is values[0] else 1)).sum() for v in values).backward()
    return [*values, x.grad, *(p.grad for p in model.parameters())]


def scale_of(values: list[torch.Tensor | None]) -> float:
    """The largest norm among gradients: what is tiny beside it may be nothing but rounding (w / w for one expert)."""
    return max((float(v.detach().double().nan_to_num().norm()) for v in values if v is not None), default=0.0)


def close(got: torch.Tensor | None, want: torch.Tensor | None, tolerance: float, floor: float) -> str:
    """'' when equal, else how far apart."""
    if got is None or want is None:
        other = want if got is None else got
        return "" if other is None or not bool(other.count_nonzero()) else "one has a value, the other none"
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype}{list(got.shape)} for {want.dtype}{list(want.shape)}"
    a, b = got.detach().double(), want.detach().double()
    if not torch.equal(a.isnan(), b.isnan()):
        return "NaN in other places"
    a, b = a.nan_to_num(), b.nan_to_num()
    error = float((a - b).norm())
    size = max(float(b.norm()), floor, 1e-3)
    return "" if error <= tolerance * size else f"off by {error / size:.2e}"


def judge(sample: Any, folder: Path, seen: Summary, options: dict[str, Any], dynamic: bool = False) -> Report:
    """Compile, compare, count; raises Wrong with the runnable source."""
    model = load(sample.source, folder)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sample.shape, generator=generator).to(getattr(torch, sample.dtype))
    want = outputs(model, model, x, sample.training)
    report = Report()
    torch._dynamo.reset()
    run = torch.compile(model, backend=Backend(Options.make(options), report=report), dynamic=dynamic or False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="moec.*")
        try:
            got = outputs(run, model, x, sample.training)
        except Exception as error:
            raise Wrong(f"{type(error).__name__}: {str(error)[:600]}\n{_runnable(sample)}") from error
    floor = {"float32": 0.02, "bfloat16": 0.2}[sample.dtype] * scale_of(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        off = close(g, w, TOLERANCE[sample.dtype], floor)
        if off:
            raise Wrong(f"value {i} is {off}\n{[s.status for s in report.sites]} {report.sites}\n{_runnable(sample)}")
    count(sample, report, seen)
    return report


def count(sample: Any, report: Report, seen: Summary) -> None:
    """Put one sample into the summary."""
    fused = bool(report.sites) and all(s.status == "fused" for s in report.sites)
    seen.modules += 1
    seen.fused += fused
    seen.supported += sample.supported
    seen.supported_fused += sample.supported and fused
    if fused:
        return
    reasons = [r for s in report.sites if s.status != "fused" for r in s.reasons] + report.not_rolled
    why = str(reasons[0].predicate) if reasons else "no candidate"
    seen.declined[f"{'supported' if sample.supported else 'twisted'}: {why[:110]}"] += 1
    if not any(r.predicate and r.location for r in reasons):
        seen.missing_reason += 1
        seen.missing.setdefault(why[:110], _runnable(sample))
    if sample.supported:
        seen.unfused.setdefault(why[:110], sample.source)


def _runnable(sample: Any) -> str:
    grad = "" if sample.training else "with torch.no_grad(): "
    x = f"torch.randn{sample.shape}.to(torch.{sample.dtype})"
    call = f"m, x = make(), {x}\n{grad}print(torch.compile(m, backend='moec')(x), m(x))"
    return f"--- runnable source ---\n{sample.source}\n{call}\n"
