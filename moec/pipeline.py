"""Passes and the pipeline that runs them: Graph → Graph, verified and recorded between any two."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from moec.ir.graph import Graph
from moec.ir.match import NoMatch
from moec.options import Options


@dataclass(frozen=True)
class Facts:
    """What passes may know besides the graph.

    grad         names of values that need a gradient in this compile (empty under no_grad)
    devices      device type of each input value ('cpu', 'cuda', …)
    not_plain    inputs that are not plain dense tensors, and what they are
    autocast     an operator whose casts under autocast are not known; '' where there is none
    refused      values whose rewrite was tried and computes something else, and the figures
    """

    options: Options = field(default_factory=Options)
    grad: frozenset[str] = frozenset()
    devices: Mapping[str, str] = field(default_factory=dict)
    not_plain: Mapping[str, str] = field(default_factory=dict)
    autocast: str = ""
    refused: Mapping[str, str] = field(default_factory=dict[str, str])

    def out_of_fuel(self, done: int) -> bool:
        """Whether nothing more may be rewritten after `done` rewrites of this pass."""
        return 0 <= self.options.fuel <= done

    def after(self, outcome: Outcome) -> Facts:
        """With the fuel that is left."""
        if self.options.fuel < 0 or not outcome.rewritten:
            return self
        return replace(self, options=replace(self.options, fuel=self.options.fuel - len(outcome.rewritten)))


@dataclass(frozen=True)
class Miss:
    """A candidate that was not rewritten: its value, its place in the user's code, and why."""

    value: str
    loc: str
    why: NoMatch


@dataclass(frozen=True)
class Outcome:
    """What one pass did. `rewritten`: the values whose meaning it replaced, in order; each costs one unit of fuel."""

    graph: Graph
    rewrites: int = 0
    misses: tuple[Miss, ...] = ()
    rewritten: tuple[str, ...] = ()


class Pass(Protocol):
    """One idea. Fields are its options; `run` is pure, and the graph verifies before and after it."""

    @property
    def name(self) -> str:
        """The pass's name in diffs, reports and pipelines."""
        ...

    def run(self, graph: Graph, facts: Facts) -> Outcome:
        """The rewritten graph."""
        ...


@dataclass(frozen=True)
class Step:
    """A pass's run, as observers see it."""

    name: str
    before: Graph
    outcome: Outcome
    seconds: float


Observer = Callable[[Step], None]


def run_pipeline(passes: Iterable[Pass], graph: Graph, facts: Facts, observers: Iterable[Observer] = ()) -> Graph:
    """Run the passes in order, telling every observer after each."""
    for each in passes:
        start = time.perf_counter()
        outcome = each.run(graph, facts)
        step = Step(each.name, graph, outcome, time.perf_counter() - start)
        for observe in observers:
            observe(step)
        graph, facts = outcome.graph, facts.after(outcome)
    return graph
