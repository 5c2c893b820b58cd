"""The pipeline: order, observers, misses."""

from dataclasses import dataclass, replace

import pytest

from moec.ir.match import NoMatch, nearest
from moec.ir.text import parse
from moec.options import Options
from moec.pipeline import Facts, Miss, Outcome, Step, run_pipeline

GRAPH = parse("graph(%x: f32[T]) {\n  %y = neg(%x) : f32[T]\n  return %y\n}")


@dataclass(frozen=True)
class Rename:
    """Gives the first instruction another word."""

    word: str
    misses: tuple[Miss, ...] = ()

    @property
    def name(self):
        return f"rename_to_{self.word}"

    def run(self, graph, facts):
        if facts.options.fuel == 0:
            return Outcome(graph)
        first, *rest = graph.instrs
        return Outcome(graph.with_instrs((replace(first, word=self.word), *rest)), 1, self.misses)


def test_passes_run_in_order_on_each_others_graphs():
    seen: list[Step] = []
    after = run_pipeline((Rename("exp"), Rename("silu")), GRAPH, Facts(), (seen.append,))
    assert after.instrs[0].word == "silu"
    assert [s.name for s in seen] == ["rename_to_exp", "rename_to_silu"]
    assert seen[0].before is GRAPH
    assert seen[1].before is seen[0].outcome.graph
    assert seen[1].outcome.graph is after
    assert all(s.seconds >= 0 and s.outcome.rewrites == 1 for s in seen)


def test_every_observer_sees_every_step_before_the_next_pass_runs():
    told: list[str] = []

    class Tell(Rename):
        def run(self, graph, facts):
            told.append(f"run {self.word}")
            return super().run(graph, facts)

    observers = (lambda s: told.append(f"1 {s.name}"), lambda s: told.append(f"2 {s.name}"))
    run_pipeline((Tell("exp"), Tell("abs")), GRAPH, Facts(), observers)
    assert told == [
        "run exp",
        "1 rename_to_exp",
        "2 rename_to_exp",
        "run abs",
        "1 rename_to_abs",
        "2 rename_to_abs",
    ]


def test_no_passes_and_no_observers():
    assert run_pipeline((), GRAPH, Facts(), (pytest.fail,)) is GRAPH
    assert run_pipeline((Rename("exp"),), GRAPH, Facts()).instrs[0].word == "exp"


def test_passes_see_the_facts():
    assert run_pipeline((Rename("exp"),), GRAPH, Facts(Options(fuel=0))) is GRAPH
    assert Facts().grad == frozenset()


def test_an_observers_error_stops_the_pipeline():
    def refuse(step):
        raise RuntimeError(step.name)

    with pytest.raises(RuntimeError, match="rename_to_exp"):
        run_pipeline((Rename("exp"), Rename("abs")), GRAPH, Facts(), (refuse,))


def test_misses_travel_with_the_outcome():
    miss = Miss("y", "model.py:3", NoMatch("k is symbolic", "y"))
    seen: list[Step] = []
    run_pipeline((Rename("exp", (miss,)),), GRAPH, Facts(), (seen.append,))
    assert seen[0].outcome.misses == (miss,)


def test_the_nearest_miss_came_furthest():
    near = NoMatch("the weights are scaled after the cast", "w", 3, "cast last")
    assert nearest([NoMatch("no topk", "x", 1), near, NoMatch("no softmax", "x", 2)]) is near
    assert near.deeper(2) == NoMatch("the weights are scaled after the cast", "w", 5, "cast last")
    assert nearest([]).reason == "nothing here looks like an MoE layer"
