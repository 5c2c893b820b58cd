"""Two compiled runs beside each other: what each pass left in its graph, and what became of each layer."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from moec.errors import TargetError
from moec.report import Report

FACTS = ("status", "form", "router", "experts", "num_experts", "top_k", "kernels", "spec")
"""What is compared of a layer."""


@dataclass(frozen=True)
class Run:
    """A run as data: {(graph, pass): text} in order, and each layer's facts by name."""

    name: str
    texts: Mapping[tuple[int, str], str]
    sites: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """Where two runs differ: a pass of a graph, or a layer; `text` is a unified diff."""

    where: str
    text: str


def run_of(name: str, data: Mapping[str, Any]) -> Run:
    """A run from a report's dictionary with texts; raises TargetError where they are missing."""
    try:
        texts = {(int(p["graph"]), str(p["name"])): str(p["text"]) for p in data["passes"]}
        sites = {f"{site['name']} ({i})": {fact: site[fact] for fact in FACTS} for i, site in enumerate(data["sites"])}
    except (KeyError, TypeError, ValueError) as error:
        raise TargetError(
            f"{name} holds no run: {type(error).__name__} {error}; write one with `moec inspect TARGET --passes --json`"
        ) from error
    return Run(name, texts, sites)


def run_of_report(name: str, report: Report) -> Run:
    """A run from a report, which must have been made with texts (as `moec.explain` does)."""
    return run_of(name, json.loads(report.to_json()))


def read_run(path: Path) -> Run:
    """A run that was written by `moec inspect TARGET --passes --json`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TargetError(f"{path} cannot be read as a run: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise TargetError(f"{path} holds {type(data).__name__}, expected a run: `moec inspect TARGET --passes --json`")
    return run_of(str(path), cast("dict[str, Any]", data))


def compare(a: Run, b: Run, context: int = 2) -> tuple[Difference, ...]:
    """Every pass and layer in which two runs differ, in order."""
    found: list[Difference] = []
    for graph, name in _keys(list(a.texts), list(b.texts)):
        where = f"graph {graph + 1}, after {name}"
        left, right = a.texts.get((graph, name)), b.texts.get((graph, name))
        if left is None or right is None:
            found.append(Difference(where, f"only in {a.name if right is None else b.name}"))
        elif left != right:
            found.append(Difference(where, _diff(a.name, b.name, left, right, context)))
    for name in _keys(list(a.sites), list(b.sites)):
        left, right = _facts(a.sites.get(name)), _facts(b.sites.get(name))
        if left != right:
            found.append(Difference(f"layer {name}", _diff(a.name, b.name, left, right, 0)))
    return tuple(found)


def _keys(left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys((*left, *right)))


def _facts(site: Mapping[str, Any] | None) -> str:
    return "\n".join(f"{fact}: {value}" for fact, value in (site or {}).items())


def _diff(a: str, b: str, left: str, right: str, context: int) -> str:
    lines = difflib.unified_diff(left.splitlines(), right.splitlines(), a, b, "", "", context, "")
    return "\n".join(lines)
