"""The kernels of a layer for a GPU that need not be there: what is asked for, compiled, as plain values."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moec.codegen.plan import Sizes
from moec.errors import TargetError
from moec.gpu.offline import Compiled, Refused, compile_offline
from moec.gpu.target import GpuTarget
from moec.kernels.jobs import KernelJob, Request, kernel_jobs, parse_spec
from moec.tools.typed import parse_sizes

DEFAULT_TOKENS = 64  # for a model, whose T is whatever it is called with


@dataclass(frozen=True)
class Kernel:
    """One launch of a layer's call: its kernel, the grid, and what the compiler made of it."""

    name: str
    grid: tuple[int, ...]
    result: Compiled | Refused

    @property
    def clean(self) -> bool:
        """Whether it compiled and nothing is wrong with it."""
        return isinstance(self.result, Compiled) and not self.result.figures.problems


@dataclass(frozen=True)
class Layer:
    """A layer's kernels on one target with one configuration."""

    name: str
    request: Request
    kernels: tuple[Kernel, ...]

    @property
    def clean(self) -> bool:
        """Whether every kernel is."""
        return all(kernel.clean for kernel in self.kernels)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the texts."""
        request = self.request
        return {
            "name": self.name,
            "spec": str(request.spec),
            "sizes": asdict(request.sizes),
            "target": request.target.name,
            "config": asdict(request.full_config),
            "clean": self.clean,
            "kernels": [_kernel_dict(kernel) for kernel in self.kernels],
        }


def _kernel_dict(kernel: Kernel) -> dict[str, Any]:
    made = kernel.result
    figures = asdict(made.figures) if isinstance(made, Compiled) else None
    if figures and figures["loop"] and isinstance(made, Compiled) and made.figures.loop:
        figures["loop"]["per_step"] = made.figures.loop.per_step
    refused = made.reason if isinstance(made, Refused) else None
    return {"name": kernel.name, "grid": list(kernel.grid), "refused": refused, "figures": figures}


def requests(what: str, target: GpuTarget, sizes: str, config: Sequence[tuple[str, Any]]) -> list[tuple[str, Request]]:
    """(layer's name, request) for a spec's text or for each distinct layer of a model.

    Raises OptionError, TargetError.
    """
    if "experts{" in what:
        spec = parse_spec(what)
        return [("spec", Request(spec, parse_sizes(spec, sizes), target, tuple(config)))]
    return [
        (name, Request(parse_spec(spec), known, target, tuple(config))) for name, spec, known in _layers(what, sizes)
    ]


def _layers(what: str, sizes: str) -> list[tuple[str, str, Sizes]]:
    """(name, spec, sizes) of each distinct fused layer of the model that the command-line target names."""
    from moec.backend import explain
    from moec.sizing.site_sizes import sizes_of
    from moec.tools.loading import load

    loaded = load(what)
    fast = {"kernels": "eager", "rest": "eager"}
    report = explain(loaded.model, *loaded.args, moec_options=fast, **loaded.kwargs)
    found: dict[tuple[str, Sizes], str] = {}
    for site in report.sites:
        if site.status != "fused":
            continue
        known = asdict(sizes_of(site, DEFAULT_TOKENS))
        found.setdefault((site.spec, parse_sizes(parse_spec(site.spec), sizes, known)), site.name)
    if not found:
        raise TargetError(f"{what}: no MoE layer is fused, so there are no kernels (moec explain {what} says why)")
    return [(name, spec, known) for (spec, known), name in found.items()]


def compile_layers(
    named: Sequence[tuple[str, Request]],
    cache_dir: Path,
    timeout: float,
    only: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Layer]:
    """Compile every kernel of every request, as many at a time as there are cores; `only`: kernels of these names."""
    wanted = [(name, request, _wanted(kernel_jobs(request), only)) for name, request in named]
    total = sum(len(jobs) for _, _, jobs in wanted)
    done = itertools.count(1)  # of several threads

    def compiled(request: Request, one: KernelJob) -> Kernel:
        result = compile_offline(one.job, request.target, cache_dir, timeout)
        progress(next(done), total)
        return Kernel(one.launch.kernel, tuple(one.launch.grid), result)

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        running = [[pool.submit(compiled, request, one) for one in jobs] for _, request, jobs in wanted]
        try:
            return [
                Layer(name, request, tuple(future.result() for future in futures))
                for (name, request, _), futures in zip(wanted, running, strict=True)
            ]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # who stops it waits for those at work, not for all


def _wanted(jobs: Sequence[KernelJob], only: Collection[str]) -> list[KernelJob]:
    wanted = [one for one in jobs if not only or one.launch.kernel in only]
    if not wanted:
        names = ", ".join(one.launch.kernel for one in jobs)
        raise TargetError(f"--kernel {', '.join(only)!r}: no such kernel; this call launches {names}")
    return wanted
