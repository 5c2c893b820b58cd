"""What was measured to be fastest, kept on disk: JSON lines that can be copied, merged and damaged without harm.

One file a winner in `tuned/` of the cache folder. A file that is anything else is reported once and left alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import Field, asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

from filelock import FileLock

from moec.codegen.build import compiler_version
from moec.codegen.cpp import emit, header_texts
from moec.codegen.triton_config import GpuConfig
from moec.codegen.tuning import Sizes, Tuning
from moec.errors import MoecError, ParseError
from moec.files import write_whole
from moec.ir.spec import KernelSpec
from moec.options import Environment
from moec.target import Target

T = TypeVar("T")

FORMAT = "moec tuned 2"  # a line of any other is no entry
INTERPRETER = "interpreter"
_GPU = re.compile(rf"sm_\d+|gfx\w+|{INTERPRETER}")
DEFAULT, EAGER = "default", "eager"  # winners that are no tuning: nothing beat the default; eager's form beat all
_LARGEST = 64 << 20  # bytes: no file of entries is larger
_NEAR = 2.0  # doublings in all dimensions together up to which a winner is taken for a neighbour


@dataclass(frozen=True)
class Key:
    """What a winner is for: a layer, a bucket of token counts (up to T), and what it ran on.

    `weights` is how a kernel's own copy of the weights is stored; empty: it reads the user's. O is 0 where it is H.
    """

    spec: str
    T: int
    H: int
    F: int
    E: int
    k: int
    threads: int
    isa: str
    weights: str = ""
    O: int = 0

    @property
    def wide(self) -> int:
        """The width of an expert's output."""
        return self.O or self.H

    @staticmethod
    def of(spec: KernelSpec | str, sizes: Sizes, threads: int, isa: str, weights: str = "") -> Key:
        """The key of a layer at these sizes."""
        s, wide = sizes, 0 if sizes.O == sizes.H else sizes.O
        return Key(str(spec), bucket(s.T), s.H, s.F, s.E, s.k, threads, isa, weights, wide)


@dataclass(frozen=True)
class Made:
    """Where a winner was measured: a winner counts in full only where all of it is the same."""

    host: str
    compiler: str
    source: str


@dataclass(frozen=True)
class Entry:
    """A winner: `best` is the text of a Tuning (on a GPU of a GpuConfig), "default" or "eager".

    median, default and eager are microseconds a call (0: not measured), spread the slowest less the fastest;
    by: tune | race; profile: how tokens were spread over experts.
    """

    key: Key
    made: Made
    best: str
    by: str
    profile: str
    date: str
    median: float
    spread: float
    default: float
    eager: float = 0.0

    @property
    def tuning(self) -> Tuning | None:
        """The numbers of a CPU's plan to use; None: the default's."""
        return None if self.best in (DEFAULT, EAGER) or self.on_gpu else Tuning.parse(self.best)

    @property
    def config(self) -> GpuConfig | None:
        """The configuration of a GPU's kernels to use; None: the default's."""
        return GpuConfig.parse(self.best) if self.on_gpu and self.best != DEFAULT else None

    @property
    def on_gpu(self) -> bool:
        """Whether it is of Triton kernels."""
        return _GPU.fullmatch(self.key.isa) is not None

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False, allow_nan=False)

    @staticmethod
    def parse(line: str) -> Entry:
        """The entry that prints as `line`; raises ParseError for anything else."""
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ParseError(f"not JSON: {error}") from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ParseError(f"not an entry: expected an object with format {FORMAT!r}")
        key, made = built(Key, data.pop("key", None)), built(Made, data.pop("made", None))
        entry = built(Entry, {**data, "key": key, "made": made})
        KernelSpec.parse(entry.key.spec)
        _ = entry.config, entry.tuning  # a text that is neither raises here
        return entry


def built(cls: type[T], data: Any) -> T:
    """A dataclass from a dictionary that was read: exactly its fields, each of its type, numbers finite and ≥ 0.

    Raises ParseError for anything else.
    """
    known: tuple[Field[Any], ...] = fields(cast("Any", cls))
    if not isinstance(data, dict) or set(cast("dict[Any, Any]", data)) != {f.name for f in known}:
        raise ParseError(f"{cls.__name__}: expected the fields {', '.join(f.name for f in known)}")
    values = cast("dict[str, Any]", data)
    for f in known:
        value, kind = values[f.name], str(f.type)
        if kind == "float" and type(value) is int and abs(value) < 1e15:
            values[f.name] = value = float(value)
        if type(value).__name__ != kind or not _sane(value):
            raise ParseError(f"{cls.__name__}.{f.name}={str(value)[:80]!a}: expected a {kind}")
    return cls(**values)


def _sane(value: Any) -> bool:
    """Whether a number is one that is measured or counted; whether a text can be written."""
    if isinstance(value, str):
        return value.isascii() or not re.search("[\ud800-\udfff]", value)
    if isinstance(value, float):
        return math.isfinite(value) and value >= 0
    return not isinstance(value, int) or 0 <= value < 1 << 40


def bucket(tokens: int) -> int:
    """The bucket of a token count: the next power of two."""
    return 1 << (tokens - 1).bit_length() if tokens > 0 else 0


def made_here(spec: str, target: Target) -> Made:
    """This host, its compiler and the source that `spec` becomes."""
    return _made_here(spec, target)


@lru_cache(maxsize=256)
def _made_here(spec: str, target: Target) -> Made:
    text = emit(KernelSpec.parse(spec), target) + "".join(text for _, text in header_texts())
    compiler = compiler_version(target.compiler) if target.compiler else ""
    return Made(target.processor, compiler, hashlib.sha256(text.encode()).hexdigest()[:16])


# --- files --------------------------------------------------------------------------------------------------------


def folder(cache_dir: Path | None = None) -> Path:
    """Where entries are kept."""
    return (cache_dir or Environment.read().cache_dir) / "tuned"


def load(where: Path | None = None) -> tuple[Entry, ...]:
    """All entries, the newest of equal ones; files that hold anything else are reported once and ignored."""
    where = where or folder()
    try:
        changed = where.stat().st_mtime_ns
    except OSError:
        return ()
    return _load(where, changed)


@lru_cache(maxsize=8)
def _load(where: Path, changed: int) -> tuple[Entry, ...]:
    del changed  # part of the key only
    found: list[Entry] = []
    for path in sorted(where.glob("*.jsonl")):
        entries, problem = read_file(path)
        if problem:
            _report(path, problem)
        found += entries
    return merged(found)


def read_file(path: Path) -> tuple[tuple[Entry, ...], str]:
    """The entries of a file, and what is wrong with its first other line (empty: nothing)."""
    try:
        if not path.is_file():  # to read a pipe would wait for its writer
            return (), "not a file"
        if path.stat().st_size > _LARGEST:
            return (), f"larger than {_LARGEST >> 20} MB"
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        return (), str(error)
    found: list[Entry] = []
    problem = ""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(Entry.parse(line))
        except MoecError as error:
            problem = problem or f"line {number}: {error}"
    return tuple(found), problem


@lru_cache(maxsize=4096)
def _report(path: Path, problem: str) -> None:
    text = (
        f"moec: {path} is not a file of tuning results and is ignored ({problem[:200]}); remove it if it is not yours"
    )
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def merged(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Entries without those that a newer one of the same key, host, compiler and source replaces."""
    newest: dict[tuple[Key, Made], Entry] = {}
    for entry in entries:
        old = newest.get((entry.key, entry.made))
        if old is None or entry.date >= old.date:
            newest[entry.key, entry.made] = entry
    return tuple(newest.values())


def store(entries: Sequence[Entry], where: Path | None = None) -> None:
    """Keep entries: each file is replaced as a whole, by one process at a time. Raises OSError where that fails."""
    where = where or folder()
    where.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(where / ".lock"):
            for entry in entries:
                write_whole(_place(where, entry), entry.to_line() + "\n")
    except NotImplementedError as error:  # what a lock raises on a file system without any
        raise OSError(f"{where}: {error}") from error
    _load.cache_clear()


def _place(where: Path, entry: Entry) -> Path:
    """The file of an entry: its own, or a free one beside a file of the same name that holds something else."""
    name = hashlib.sha256(repr((entry.key, entry.made)).encode()).hexdigest()[:24]
    tries = 0
    while True:
        path = where / f"{name}{f'-{tries}' if tries else ''}.jsonl"
        entries, problem = read_file(path) if path.exists() or path.is_symlink() else ((), "")
        if not problem and all((e.key, e.made) == (entry.key, entry.made) for e in entries):
            return path
        tries += 1


def write_file(path: Path, entries: Sequence[Entry]) -> None:
    """Entries as one file to copy elsewhere."""
    write_whole(path.absolute(), "".join(f"{entry.to_line()}\n" for entry in entries))


def clear(where: Path | None = None) -> int:
    """Remove all entries, and no file that holds anything else; the number of files removed."""
    where = where or folder()
    removed = 0
    for path in where.glob("*.jsonl"):
        entries, problem = read_file(path)
        if entries and not problem:
            path.unlink(missing_ok=True)
            removed += 1
    _load.cache_clear()
    return removed


# --- finding ------------------------------------------------------------------------------------------------------


def exact(key: Key, made: Made, entries: Iterable[Entry]) -> Entry | None:
    """The winner for exactly this."""
    return next((e for e in entries if e.key == key and e.made == made), None)


def nearest(key: Key, made: Made, entries: Iterable[Entry]) -> Entry | None:
    """The winner for this, or else that of the nearest sizes with the same experts on the same instruction set.

    Eager's form is a verdict on one host and size: it is never taken from a neighbour.
    """
    found = exact(key, made, entries)
    if found is not None:
        return found
    near = [(distance(key, made, e), -i, e) for i, e in enumerate(entries) if e.best != EAGER and _alike(key, e.key)]
    best = min(near, key=lambda each: each[:2], default=None)
    return best[2] if best is not None and best[0] <= _NEAR else None


def _alike(one: Key, other: Key) -> bool:
    same = (one.isa, one.weights) == (other.isa, other.weights)
    return same and KernelSpec.parse(one.spec).experts == KernelSpec.parse(other.spec).experts


def distance(key: Key, made: Made, entry: Entry) -> float:
    """Doublings between the sizes of two keys, and a little for another compiler, source or host."""
    names = ("T", "H", "F", "E", "k", "threads", "wide")
    sizes = sum(abs(math.log2(max(getattr(key, n), 1) / max(getattr(entry.key, n), 1))) for n in names)
    other = entry.made
    return (
        sizes
        + 0.1 * (made.compiler != other.compiler)
        + 0.2 * (made.source != other.source)
        + 0.5 * (made.host != other.host)
    )
