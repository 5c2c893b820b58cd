"""`moec tune`: what to tune, from a model or a kernel spec, with a progress bar; and the report of what was tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.io import console, print_json, say
from moec.cli.types import Debug, Json
from moec.errors import OptionError, TargetError
from moec.ir.engine import check_weights, only_for_triton
from moec.tools.typed import check_writable, seconds_given

if TYPE_CHECKING:
    from moec.codegen.tuning import Sizes
    from moec.tune.job import Job
    from moec.tune.run import Result


def tune_command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="TARGET|SPEC|report",
            help="A model (file.py:callable), a kernel spec with --sizes, or `report`: what was found so far.",
            show_default=False,
        ),
    ],
    budget: Annotated[float, typer.Option(help="Seconds of measuring, shared by all layers and token counts.")] = 60.0,
    tokens: Annotated[str, typer.Option(help="T, numbers of tokens to tune for, separated by commas.")] = "1,8,64,512",
    profile: Annotated[
        str, typer.Option(help="How tokens are spread over experts: uniform, zipf, zipf:1.2, or a JSON file of counts.")
    ] = "uniform",
    sizes: Annotated[str, typer.Option(help="Sizes of a SPEC's layer.")] = "H=2048,F=768,E=64,k=8",
    weights: Annotated[
        str, typer.Option(help="Tune the kernels of this `weights` option: stored, packed, bf16, int8, int8:N.")
    ] = "stored",
    target: Annotated[
        str,
        typer.Option(
            metavar="GPU", help="Rank the configurations of this GPU's kernels (sm_90, gfx942, …) and compile them."
        ),
    ] = "",
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="GPU", help="Measure the Triton kernels on this GPU (cuda, cuda:1), not the CPU's."
        ),
    ] = "",
    plot: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Draw the report into this file.", show_default=False)
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Measure the candidates of each layer's kernels and keep the fastest; stopped or killed, it continues later."""
    check_writable("--plot", plot)
    if what == "report":
        return _report(plot, json)
    seconds_given("--budget", budget)
    _check_weights(weights, on_gpu=bool(target or device))
    if target:
        _check_modelled(target, device, plot)
        return _modelled(what, target, tokens, sizes, budget, weights, json)
    jobs = [replace(job, weights=weights, device=_device(device)) for job in _jobs(what, tokens, profile, sizes)]
    return _measured(jobs, budget, plot, json)


def _check_weights(weights: str, on_gpu: bool) -> None:
    """Raises OptionError for a copy of the weights that the kernels to be tuned cannot read."""
    check_weights(weights)
    if weights == "packed" and on_gpu:
        raise OptionError("--weights packed: only C++ kernels read such a copy; leave out --target and --device")
    if only_for_triton(weights) and not on_gpu:
        raise OptionError(f"--weights {weights}: C++ kernels read no such copy; give --device cuda, or int8")


def _check_modelled(target: str, device: str, plot: Path | None) -> None:
    """Without the GPU nothing is measured; raises OptionError for what would be left unused."""
    if device:
        raise OptionError(f"--device {device}: of no use with --target {target}, which measures nothing; give one")
    if plot is not None:
        raise OptionError(f"--plot {plot}: of no use with --target {target}, which measures nothing; leave it out")


def _device(name: str) -> str:
    """The GPU's name with its number; raises OptionError where there is none."""
    if not name:
        return ""
    from moec.tune.gpu import gpu_device

    return str(gpu_device(name))


def _modelled(what: str, target: str, tokens: str, sizes: str, budget: float, weights: str, json: bool) -> int:
    """Without the GPU: ranked by the model and compiled, nothing measured, nothing kept."""
    from moec.codegen.encode import coded_spec
    from moec.codegen.plan import Sizes
    from moec.gpu.target import gpu_target
    from moec.ir.spec import KernelSpec
    from moec.options import Environment
    from moec.tune.modelled import rank_offline, ranking_table

    gpu, found = gpu_target(target), list[Any]()
    jobs = _jobs(what, tokens, "uniform", sizes)
    for job in jobs:
        spec = KernelSpec.parse(job.spec)
        spec = spec if weights == "stored" else coded_spec(spec, weights)
        with console(stderr=True).status(f"T={job.sizes.T} on {gpu.name}"):
            at, folder = Sizes(**asdict(job.sizes)), Environment.read().cache_dir
            found.append(rank_offline(spec, at, gpu, budget / len(jobs), folder))
    if json:
        print_json([ranking.to_dict() for ranking in found])
    else:
        console().print(ranking_table(found))
    return 0


def _measured(jobs: Sequence[Job], budget: float, path: Path | None, json: bool) -> int:
    """On this machine: the fastest kept."""
    from moec.tune.view import report_table

    results = _run(jobs, budget / len(jobs))
    found = [(job, r.candidates, r.decision) for job, r in zip(jobs, results, strict=True)]
    if path is not None:
        _draw(found, path)
    if json:
        print_json([{**asdict(r.entry), "resumed": r.resumed, "measured": _count(r)} for r in results])
    else:
        console().print(report_table(found))
    return 0


def _run(jobs: Sequence[Job], budget: float) -> list[Result]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from moec.tune.run import tune

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    results: list[Result] = []
    with Progress(*columns, console=console(stderr=True)) as bar:
        for job in jobs:
            s = job.sizes
            task = bar.add_task(f"H={s.H} F={s.F} E={s.E} k={s.k} T={s.T}", total=budget, note="starting")

            def show(spent: float, measured: int, task: Any = task) -> None:
                bar.update(task, completed=min(spent, budget), note=f"{measured} measurements")

            result = tune(job, budget, progress=show)
            results.append(result)
            resumed = f", {result.resumed} from before" if result.resumed else ""
            bar.update(task, completed=budget, note=f"{_count(result)} measurements{resumed}")
    return results


def _count(result: Result) -> int:
    return sum(len(s.seconds) for s in result.decision.standings)


def _jobs(what: str, tokens: str, profile: str, sizes: str) -> list[Job]:
    """Every distinct layer at every number of tokens. Raises TargetError or OptionError."""
    import torch

    from moec.tools.typed import token_counts
    from moec.tune.job import Job, shares

    counts = token_counts(tokens)
    layers = _layers_of_spec(what, sizes) if "experts{" in what else _layers_of_model(what)
    for _, at in layers:
        shares(profile, at.E)
    threads = torch.get_num_threads()
    return [Job(spec, replace(at, T=T), threads, profile) for spec, at in layers for T in counts]


def _layers_of_spec(text: str, sizes: str) -> list[tuple[str, Sizes]]:
    """(spec, sizes for one token)."""
    from moec.codegen.cpp import check
    from moec.errors import CodegenError, ParseError
    from moec.ir.spec import KernelSpec
    from moec.tools.typed import parse_sizes

    try:
        spec = KernelSpec.parse(text)
        check(spec)
    except (ParseError, CodegenError) as error:
        raise TargetError(f"SPEC {text!r}: {error}") from error
    if "T=" in sizes:
        raise OptionError(f"--sizes {sizes!r}: T is not a size here; for example --tokens 1,8,64")
    return [(str(spec), parse_sizes(spec, sizes, {"T": 1}))]


def _layers_of_model(target: str) -> list[tuple[str, Sizes]]:
    import torch

    from moec.backend import explain
    from moec.sizing.site_sizes import sizes_of
    from moec.tools.loading import load

    loaded = load(target)
    with console(stderr=True).status(f"compiling {target}"), torch.no_grad():
        report = explain(loaded.model, *loaded.args, **loaded.kwargs)
    found = dict.fromkeys((site.spec, sizes_of(site, tokens=1)) for site in report.sites if site.status == "fused")
    if not found:
        raise TargetError(f"target {target!r}: no MoE layer was fused; `moec explain {target}` says why")
    return list(found)


def _report(path: Path | None, json: bool) -> int:
    from moec.tune.run import finished
    from moec.tune.view import report_data, report_table

    searches = finished()
    if path is not None:
        _draw(searches, path)
    if json:
        print_json(report_data(searches))
    elif searches:
        console().print(report_table(searches))
    else:
        console().print("nothing was tuned yet: moec tune TARGET", highlight=False)
    return 0


def _draw(searches: Sequence[Any], path: Path) -> None:
    from moec.tune.view import plot

    say(f"wrote {plot(searches, path)}")
