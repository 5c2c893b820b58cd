"""`moec cache ls | export | import | merge | clear`: what moec keeps on disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.io import console, print_json
from moec.cli.types import Debug, Json
from moec.errors import TargetError

if TYPE_CHECKING:
    from rich.table import Table

    from moec.runtime.tune_cache import Entry

cache_app = typer.Typer(
    help="What moec keeps on disk: kernels, tuning results, proofs.", no_args_is_help=True, add_completion=False
)

OutFile = Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.", show_default=False)]
InFiles = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of tuning results.", show_default=False)]

_HASH = "[0-9a-f]{32}"
# What is written, by its name: a user's own file is never removed.
_KERNELS = re.compile(rf"{_HASH}\.so|triton/moec_{_HASH}\.py|offline/{_HASH}\.json\.gz")
_BUILDS = re.compile(rf"{_HASH}\.(so\.lock|new)")  # the lock of a build, and the folder of one that is not finished
_PROOFS = re.compile(rf"proofs/{_HASH}\.json")


@cache_app.command("ls")
def cache_ls(json: Json = False, debug: Debug = False) -> int:
    """List built kernels and tuning results."""
    from moec.options import Environment
    from moec.runtime import tune_cache

    folder = Environment.read().cache_dir
    entries = tune_cache.load()
    built = _named(folder, _KERNELS, ".so")
    size = sum(path.stat().st_size for path in built)
    if json:
        kernels = {"count": len(built), "bytes": size}
        print_json({"folder": str(folder), "kernels": kernels, "tuned": [asdict(e) for e in entries]})
        return 0
    out = console()
    text = f"{folder}: {len(built)} kernels ({size / 1e6:.1f} MB), {len(entries)} tuning results"
    out.print(text, highlight=False, markup=False, soft_wrap=True)
    if entries:
        out.print(entries_table(entries))
    return 0


@cache_app.command("export")
def cache_export(file: OutFile, json: Json = False, debug: Debug = False) -> int:
    """Write all tuning results as one file, to be imported elsewhere."""
    from moec.runtime import tune_cache

    entries = tune_cache.load()
    _save(file, entries)
    return _said(f"{len(entries)} tuning results written to {file}", {"written": len(entries)}, json)


@cache_app.command("import")
def cache_import(files: InFiles, json: Json = False, debug: Debug = False) -> int:
    """Take tuning results from files; of equal ones the newest stays. Lines that are none are reported and left out."""
    from moec.runtime import tune_cache

    new = _read(files)
    before = {(e.key, e.made): e for e in tune_cache.load()}
    taken = [e for e in tune_cache.merged((*before.values(), *new)) if before.get((e.key, e.made)) != e]
    tune_cache.store(taken)
    text = f"{len(taken)} tuning results taken, {len(new) - len(taken)} were there already"
    return _said(text, {"taken": len(taken), "known": len(new) - len(taken)}, json)


@cache_app.command("merge")
def cache_merge(out: OutFile, files: InFiles, json: Json = False, debug: Debug = False) -> int:
    """Write the results of several files as one file; of equal ones the newest stays."""
    from moec.runtime import tune_cache

    entries = tune_cache.merged(_read(files))
    _save(out, entries)
    return _said(f"{len(entries)} tuning results written to {out}", {"written": len(entries)}, json)


@cache_app.command("clear")
def cache_clear(
    tuned: Annotated[bool, typer.Option("--tuned", help="Only tuning results and unfinished tunings.")] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Only built kernels.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Remove built kernels, tuning results and proofs; files that moec did not write stay."""
    from moec.options import Environment
    from moec.runtime import tune_cache

    both = tuned == kernels
    folder = Environment.read().cache_dir
    removed = {"tuned": 0, "kernels": 0, "proofs": 0}
    if tuned or both:
        removed["tuned"] = tune_cache.clear()
    if kernels or both:
        removed["kernels"] = len(_named(folder, _KERNELS, ".so"))
        _unlink(_named(folder, _KERNELS))
        for key in {path.name.partition(".")[0] for path in _named(folder, _BUILDS)}:
            _remove_build(folder, key)
    if both:
        removed["proofs"] = _unlink(_named(folder, _PROOFS))
    said = "{tuned} tuning results, {kernels} kernels and {proofs} proofs removed".format(**removed)
    return _said(said, removed, json)


def _named(folder: Path, pattern: re.Pattern[str], suffix: str = "") -> list[Path]:
    found = [*folder.glob("*"), *folder.glob("*/*")]
    named = (path for path in sorted(found) if pattern.fullmatch(path.relative_to(folder).as_posix()))
    return [path for path in named if path.name.endswith(suffix)]


def _unlink(paths: Sequence[Path]) -> int:
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


def _remove_build(folder: Path, key: str) -> None:
    """Remove what a build that has ended or was killed has left; one that is at work holds its lock, and stays."""
    from filelock import FileLock, Timeout

    lock = folder / f"{key}.so.lock"
    try:
        with FileLock(lock, timeout=0):
            shutil.rmtree(folder / f"{key}.new", ignore_errors=True)
            lock.unlink(missing_ok=True)
    except (Timeout, OSError, NotImplementedError):  # the latter: a file system without locks
        return


def _read(files: Sequence[Path]) -> list[Entry]:
    from moec.runtime import tune_cache

    found: list[Entry] = []
    for path in files:
        if not path.is_file():
            raise TargetError(f"file {str(path)!r} does not exist; `moec cache export FILE` writes one")
        entries, problem = tune_cache.read_file(path)
        if not entries and problem:
            raise TargetError(f"file {str(path)!r} holds no tuning results ({problem})")
        if problem:
            console(stderr=True).print(f"{path}: {problem}", markup=False, highlight=False, soft_wrap=True)
        found += entries
    return found


def _save(path: Path, entries: Sequence[Entry]) -> None:
    from moec.runtime import tune_cache

    try:
        tune_cache.write_file(path, entries)
    except OSError as error:
        raise TargetError(f"file {str(path)!r} cannot be written: {error.strerror or error}") from error


def _said(text: str, data: dict[str, Any], json: bool) -> int:
    if json:
        print_json(data)
    else:
        console().print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


def entries_table(entries: Sequence[Entry]) -> Table:
    """Tuning results, one a row."""
    from rich import box
    from rich.text import Text

    from moec.view.fitting import FittingTable

    table = FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("layer", "T ≤", "threads", "ms", "default ms", "best", "by", "date", "where"):
        table.add_column(name, overflow="fold", justify="right" if name in ("T ≤", "threads", "ms") else "left")
    for e in sorted(entries, key=lambda e: (e.key.spec, e.key.H, e.key.F, e.key.T)):
        k = e.key
        layer = f"{k.spec}\nH={k.H} F={k.F} E={k.E} k={k.k} {k.weights}".rstrip()
        cells = (layer, str(k.T), str(k.threads), f"{e.median / 1e3:.3g}", f"{e.default / 1e3:.3g}", e.best)
        made = (f"{e.by}, {e.profile}", e.date[:10], f"{k.isa}, {e.made.host}")
        table.add_row(*map(Text, (*cells, *made)))
    return table
