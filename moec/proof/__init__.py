"""Each distinct rewrite is proved before it is used: the user's nodes and what replaces them give the same numbers.

`prove` is asked once a graph, `prove_bodies` once a graph in which experts keep code of their own. Layers of one
structure are proved once, and the verdict is remembered on disk; what there was no time for is tried by the next
process that compiles the structure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from torch import fx

from moec.ir.graph import Graph
from moec.passes.opaque.dispatch import OpaqueSite
from moec.passes.raising.raise_graph import Raised
from moec.proof.bodies import Bodies
from moec.proof.compare import Difference, Runner
from moec.proof.copying import Fails, Unprovable
from moec.proof.region import Carver, Pair
from moec.proof.routings import SHORT, Trial, applies
from moec.proof.sizes import Sizes, full, shrunk
from moec.proof.store import Verdict, key_of, recall, remember

SECONDS = 1.0
"""How long the proof of one structure may take; what is left of the trials then is not run."""

AFFORDABLE = 4_000_000
"""Elements of the leaves up to which a region can be run in its own sizes."""

__all__ = ["Verdict", "prove", "prove_bodies"]


def prove(
    gm: fx.GraphModule, raised: Raised, graph: Graph, grad: frozenset[str], folder: Path, seconds: float = SECONDS
) -> dict[str, Verdict]:
    """A verdict for each value that `graph` makes anew, before it is lowered into `gm`."""
    carver = Carver(gm, raised, graph, grad)
    known: dict[str, Verdict] = {}
    return {root: _verdict(lambda root=root: carver.pair(root), folder, seconds, known) for root in carver.groups}


def prove_bodies(
    gm: fx.GraphModule,
    raised: Raised,
    sites: Iterable[OpaqueSite],
    grad: frozenset[str],
    folder: Path,
    seconds: float = SECONDS,
) -> dict[str, Verdict]:
    """A verdict for each loop over experts with code of their own, by its root, before its rows are sorted in `gm`."""
    bodies = Bodies(gm, raised, grad)
    known: dict[str, Verdict] = {}

    def of(site: OpaqueSite) -> Verdict:
        if site.form == "grouped":
            return Verdict("unchanged", reason="rows come sorted, so that the loop stays as it was written")
        return _verdict(lambda: bodies.pair(site), folder, seconds, known)

    return {site.root: of(site) for site in sites}


def _verdict(carve: Callable[[], Pair], folder: Path, seconds: float, known: dict[str, Verdict]) -> Verdict:
    try:
        pair = carve()
        sizes = shrunk(pair)
        key = key_of(pair, sizes, seconds)
    except Unprovable as error:
        return Verdict("unproved", reason=str(error))
    if key in known:
        return known[key]
    found = recall(key, folder) if key else None
    if found is None or found.left:
        found = _prove(pair, sizes, seconds, found or Verdict("unproved"))
        if key and found.status != "unproved":
            remember(key, folder, found)
    if key:
        known[key] = found
    return found


def _prove(pair: Pair, sizes: tuple[Sizes, ...], seconds: float, before: Verdict) -> Verdict:
    """In small sizes; where those do not work out, in its own. Without the trials that were made `before`."""
    start = time.perf_counter()
    tried = [sizes] if sizes else []
    own = full(pair)
    if _elements(pair, own) <= AFFORDABLE and own not in sizes:
        tried.append((own,))
    verdict = Verdict("unproved", reason="no small sizes keep the conditions under which the graph was captured")
    for each in tried:
        if _elements(pair, each[0]) > AFFORDABLE:
            verdict = Verdict("unproved", reason="the region is too large to run, and its sizes cannot be made smaller")
            continue
        verdict = _try_all(pair, each, start, seconds, before)
        if verdict.status == "proved":
            break
    return verdict


def _elements(pair: Pair, sizes: Sizes) -> int:
    total = 0
    for leaf in pair.leaves:
        count = 1
        for dim in sizes.shape(leaf.type.shape):
            count *= dim
        total += count
    return total


def _try_all(pair: Pair, sizes: tuple[Sizes, ...], start: float, seconds: float, before: Verdict) -> Verdict:
    runner = Runner(pair)
    done = list(before.routings)
    worst, missing, failed, left = before.error, "", "", 0
    for trial in SHORT:
        if not applies(trial, pair) or trial.routing in before.routings:
            continue
        if len(done) > len(before.routings) and time.perf_counter() - start > seconds:
            left += 1
            continue
        at = sizes[min(trial.tokens, len(sizes) - 1)]
        try:
            found = _run(runner, trial, at)
        except Unprovable as error:
            missing = missing or str(error)
            failed = failed or (str(error) if isinstance(error, Fails) else "")
            continue
        wrong = [d for d in found if d.wrong]
        if wrong:
            return _wrong(pair, trial, at, wrong, time.perf_counter() - start)
        done.append(trial.routing)
        worst = max([worst, *(d.error for d in found if trial.exact)])
    spent = time.perf_counter() - start
    if not done and failed:
        return Verdict("wrong", seconds=spent, reason=failed)
    if not done:
        return Verdict("unproved", seconds=spent, reason=missing)
    return Verdict("proved", tuple(done), worst, spent, left=left)


def _run(runner: Runner, trial: Trial, sizes: Sizes) -> list[Difference]:
    """In fp64 where every operator takes it, else in the model's own dtypes."""
    try:
        return runner.trial(trial, sizes)
    except Unprovable:
        if not trial.exact:
            raise
        return runner.trial(replace(trial, exact=False), sizes)


def _wrong(pair: Pair, trial: Trial, sizes: Sizes, wrong: list[Difference], seconds: float) -> Verdict:
    most = max(wrong, key=lambda d: float("inf") if d.error != d.error else d.error)
    token = next((leaf for leaf in pair.leaves if leaf.role == "token"), pair.leaves[0])
    what = "the output" if most.what == pair.root else most.what
    reason = (
        f"{what} differs by {most.error:.1e} of its largest value (allowed {most.allowed:.0e}), "
        f"routing {trial.routing!r}, {sizes.shape(token.type.shape)[0]} tokens"
    )
    return Verdict("wrong", (trial.routing,), most.error, seconds, reason)
