"""The long version of the proof: more routings, sizes and dtypes, with the kernels that will really run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moec.passes.raising.raise_graph import fake
from moec.proof.compare import Difference, Runner
from moec.proof.copying import Unprovable
from moec.proof.region import Pair
from moec.proof.routings import Trial, applies, values
from moec.proof.sizes import Sizes, full, shrunk

ROUTINGS = ("random", "one expert", "ties", "repeated")
SEEDS = 5
EXACT = "exact"
"""Of the runner in fp64, which no kernel computes in."""
OWN_SIZE = 40_000_000
"""Elements of the leaves up to which a layer is run in its own size with the model's own parameters."""


@dataclass
class Examined:
    """What the trials of one rewrite have shown; errors are relative to the largest value of their tensor.

    exact      the largest error of an output in fp64: what the rewrite itself changes
    own        the largest error of an output in the model's dtypes, with the kernels that run
    gradients  the largest error of a gradient in fp64; None where no gradient flows
    agreement  the share of choices that are the same experts, in the model's dtypes; None: the model's own choices
    """

    exact: float = 0.0
    own: float = 0.0
    gradients: float | None = None
    agreement: float | None = None
    trials: int = 0
    routings: tuple[str, ...] = ()
    sizes: tuple[tuple[int, ...], ...] = ()
    notes: list[str] = field(default_factory=list[str])
    wrong: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Case:
    """One trial, in one size, on one engine."""

    trial: Trial
    sizes: Sizes
    seed: int
    engine: str
    own_parameters: bool = False


def examine(pair: Pair, engine: str) -> Examined:
    """Every routing, several times, in every size that is possible. `engine`: the kernels of the compiled model."""
    seen = Examined()
    runners = {EXACT: Runner(pair), engine: Runner(pair, engine, home_of(pair))}
    for case in _cases(pair, engine, seen):
        try:
            leaves = values(pair, case.trial, case.sizes, case.seed)
            leaves.update(_parameters(pair) if case.own_parameters else {})
            runner = runners[case.engine]
            found = runner.differences(leaves, case.sizes, case.trial.exact, case.trial.gradients)
        except Unprovable as error:
            seen.notes += [str(error)] if str(error) not in seen.notes else []
            continue
        _record(seen, pair, case, found)
    return seen


def _cases(pair: Pair, engine: str, seen: Examined) -> Iterator[Case]:
    sizes = shrunk(pair)
    for size, routing, seed in itertools.product(sizes, ROUTINGS, range(SEEDS)):
        exact = Trial(routing, True)
        if applies(exact, pair):
            yield Case(exact, size, seed, EXACT)
            yield Case(replace(exact, exact=False, gradients=False), size, seed, engine)
    own = full(pair)
    elements = sum(torch.Size(own.shape(leaf.type.shape)).numel() for leaf in pair.leaves)
    if elements > OWN_SIZE:
        seen.notes.append(
            f"not run alone in its own size: {elements / 1e6:.0f} M elements, limit {OWN_SIZE / 1e6:.0f} M"
        )
        return
    for seed in range(SEEDS):
        yield Case(Trial("random", False), own, seed, engine, own_parameters=True)


def home_of(pair: Pair) -> torch.device:
    """Where the model's own tensors are, hence its kernels; the CPU where there is no such device here."""
    nodes = (leaf.node for leaf in pair.leaves if leaf.role == "param")
    values = [fake(node) for node in nodes if node is not None]
    found = {value.device for value in values if isinstance(value, Tensor) and value.device.type == "cuda"}
    return found.pop() if len(found) == 1 and torch.cuda.is_available() else torch.device("cpu")


def _parameters(pair: Pair) -> dict[str, Tensor]:
    """The model's own tensors, where Dynamo still holds them."""
    found: dict[str, Tensor] = {}
    for leaf in pair.leaves:
        given = leaf.node.meta.get("grapharg") if leaf.node is not None and leaf.node.op == "placeholder" else None
        value = getattr(given, "example", None)
        if leaf.role in ("param", "router") and isinstance(value, Tensor) and type(value) in _PLAIN:
            found[leaf.name] = value.detach()
    return found


_PLAIN = (Tensor, torch.nn.Parameter)


def _record(seen: Examined, pair: Pair, case: Case, found: list[Difference]) -> None:
    token = next((leaf for leaf in pair.leaves if leaf.role == "token"), pair.leaves[0])
    shape = case.sizes.shape(token.type.shape)
    seen.trials += 1
    seen.routings = tuple(dict.fromkeys((*seen.routings, case.trial.routing)))
    seen.sizes = tuple(dict.fromkeys((*seen.sizes, shape)))
    count = len(pair.outputs)
    floats = [d.error for d in found[:count] if d.allowed]
    if case.trial.exact:
        seen.exact = max([seen.exact, *floats])
        if found[count:]:
            seen.gradients = max([seen.gradients or 0.0, *(d.error for d in found[count:])])
    else:
        seen.own = max([seen.own, *floats])
        for choices in (d for d in found[:count] if not d.allowed):
            seen.agreement = min(1.0 if seen.agreement is None else seen.agreement, 1.0 - choices.error)
    for each in (d for d in found if d.wrong):
        dtypes = "fp64" if case.trial.exact else f"the model's dtypes, {case.engine} engine"
        seen.wrong.append(
            f"{each.what} differs by {each.error:.1e} (allowed {each.allowed:.0e}): routing {case.trial.routing!r}, "
            f"x{list(shape)}, {dtypes}, seed {case.seed}"
        )
