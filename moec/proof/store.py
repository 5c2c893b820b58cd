"""Verdicts remembered on disk, by the structure of the rewrite and by moec's own source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from moec.files import write_whole
from moec.passes.raising.words import is_torchs
from moec.proof.region import Half, Pair
from moec.proof.sizes import Sizes

ROOMS = ("**/*.py", "passes/**/*.py", "codegen/**/*.py")
"""Patterns of moec's source below its folder: `**` does not follow links, and passes and codegen may be some."""

_REMEMBERED = ("proved", "wrong")


@dataclass(frozen=True)
class Verdict:
    """What is known about one rewrite.

    status    proved: all trials agree; wrong: one does not; unproved: no trial could be run; off: not asked for;
              unchanged: nothing was rewritten
    error     the largest difference seen, relative to the largest value of its tensor
    left      trials for which there was no time: the next process that compiles this makes them
    """

    status: str
    routings: tuple[str, ...] = ()
    error: float = 0.0
    seconds: float = 0.0
    reason: str = ""
    remembered: bool = False
    left: int = 0

    def __str__(self) -> str:
        if self.status != "proved":
            return self.status + (f": {self.reason}" if self.reason else "")
        how = "before" if self.remembered else f"in {self.seconds:.2f} s"
        left = f", {self.left} left for want of time" if self.left else ""
        return f"proved {how}: {len(self.routings)} routings{left}, largest error {self.error:.0e}"


def recall(key: str, folder: Path) -> Verdict | None:
    """The remembered verdict; None where there is none, or it cannot be read."""
    try:
        values: dict[str, Any] = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        values["routings"] = tuple(values["routings"])
        verdict = Verdict(**values)
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return replace(verdict, remembered=True) if _is_whole(verdict) else None


def _is_whole(verdict: Verdict) -> bool:
    """Whether what was read has the types that were written."""
    texts: tuple[Any, ...] = (verdict.status, verdict.reason, *verdict.routings)
    numbers: tuple[Any, ...] = (verdict.error, verdict.seconds)
    right = all(isinstance(text, str) for text in texts) and verdict.status in _REMEMBERED
    counted = type(verdict.left) is int and verdict.left >= 0
    return right and counted and all(type(number) is float and not number < 0 for number in numbers)


def remember(key: str, folder: Path, verdict: Verdict) -> None:
    """Keep a verdict; a cache that cannot be written costs the next compile a proof, and nothing else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{key}.json", json.dumps(asdict(verdict)))
    except OSError:
        return


def key_of(pair: Pair, sizes: tuple[Sizes, ...], seconds: float) -> str:
    """The structure of a rewrite in one word: layers that differ in number, names or parameters share it.

    Empty where the matched code calls functions that are not torch's: their text is not part of the graph.
    """
    index = {leaf.name: i for i, leaf in enumerate(pair.leaves)}
    halves = [_half_text(half, index, sizes[:1]) for half in (pair.original, pair.replacement)]
    if any(text is None for text in halves):
        return ""
    leaves = [
        (leaf.role, leaf.type.dtype, [s.shape(leaf.type.shape) for s in sizes], leaf.name in pair.needs)
        for leaf in pair.leaves
    ]
    text = repr((halves, leaves, pair.distinct, seconds, torch.__version__, source_hash()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _half_text(half: Half, index: Mapping[str, int], sizes: tuple[Sizes, ...]) -> str | None:
    """The graph with nodes and leaves by number; None where a target has no meaning of its own."""
    numbers: dict[fx.Node, str] = {}
    lines: list[str] = []

    def say(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return numbers[value]
        return str(value) if not isinstance(value, (int, float, bool, str, type(None))) else value

    for i, node in enumerate(half.graph.nodes):
        numbers[node] = f"leaf{index[half.feeds[node.name]]}" if node.op == "placeholder" else f"%{i}"
        if node.op == "placeholder":
            continue
        target = _target_text(node.target)
        if target is None:
            return None
        args = (node.args, dict(node.kwargs))
        lines.append(
            f"{numbers[node]} {node.op} {target} {map_aggregate(sizes[0].argument(args) if sizes else args, say)}"
        )
    return "\n".join(lines)


def _target_text(target: Any) -> str | None:
    if isinstance(target, str):
        return target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = str(target)
        return name if name.startswith(("aten.", "moec.", "prim.", "prims.")) else None
    module = getattr(target, "__module__", "") or ""
    if isinstance(target, FunctionType) and not (is_torchs(target) or module.startswith("moec.")):
        return None  # torch's version and moec's source are part of the key; nobody else's are
    return f"{module}.{getattr(target, '__qualname__', target)}"


@lru_cache(maxsize=1)
def source_hash() -> str:
    """moec's own source: a changed matcher forgets what the old one proved."""
    room = Path(__file__).parent.parent
    found = hashlib.sha256()
    for path in sorted({p for pattern in ROOMS for p in room.glob(pattern)}):
        found.update(str(path.relative_to(room)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()
