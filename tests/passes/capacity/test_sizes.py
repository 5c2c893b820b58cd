"""What is left of capacity routing: no tensor the size of [T, E, C] in forward or backward, work in proportion to the
pairs that are kept, and no drop logic where C ≥ T·k."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from spelling import E, H, K
from spellings_capacity import P8, SPELLINGS, Counted, Groups, KeptPairs, Top2
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from moec.backend import Backend
from moec.codegen import twin
from moec.options import Options

T = 96
EAGER = {"rest": "eager", "kernels": "eager", "proof": "off"}
TIGHT, LOOSE, AMPLE = 0.4, 2.0, float(E)  # C is too small for many; nearly enough; at least T·k
PLACES = ("cumsum", "lt", "le", "gt", "ge", "less", "minimum")
"""What counts places in a queue, and compares them with the seats."""


def shapes(graph: fx.Graph) -> list[tuple[str, tuple[int, ...]]]:
    """Every tensor of a graph."""
    found = []
    for node in graph.nodes:
        value = node.meta.get("val", node.meta.get("example_value"))
        values = value if isinstance(value, (tuple, list)) else (value,)
        found += [(node.name, tuple(v.shape)) for v in values if isinstance(v, torch.Tensor)]
    return found


@dataclass(frozen=True)
class Watched(Backend):
    """Keeps the graphs of forward and backward as AOTAutograd makes them, and the words of the one before it."""

    graphs: list[fx.Graph] = field(default_factory=list)
    words: set[str] = field(default_factory=set)

    def compile_rest(self, gm, example_inputs):
        targets = (n.target for n in gm.graph.nodes)
        self.words.update(t if isinstance(t, str) else t.__name__.partition(".")[0] for t in targets)

        def keep(inner, inputs):
            self.graphs.append(inner.graph)
            return inner

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(gm, example_inputs)


def graphs_of(model, x, backend: Backend) -> list[fx.Graph]:
    """The graphs of one training step."""
    torch._dynamo.reset()
    y = torch.compile(model, backend=backend)(x)
    y = y[0] if isinstance(y, tuple) else y
    y.square().sum().backward()
    return backend.graphs


def made(kind, factor):
    torch.manual_seed(0)
    (x,) = next(s for s in SPELLINGS if s.make is kind).inputs(T)
    return kind(factor), x, x.numel() // H


def sites_of(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if str(n.target).startswith("moec.experts")]


def as_large_as_masks(graph: fx.Graph, limit: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, shape) for name, shape in shapes(graph) if torch.Size(shape).numel() >= limit]


@pytest.mark.parametrize(("kind", "factor"), [*((kind, LOOSE) for kind in P8), (Top2, TIGHT), (Groups, TIGHT)])
def test_no_tensor_is_as_large_as_t_e_c(kind, factor):
    """In forward and backward; in the model as it is written there are such tensors in both."""
    model, x, count = made(kind, factor)
    limit = count * E * int(factor * K * T / E)
    ours = graphs_of(model, x.requires_grad_(), Watched(Options.make(EAGER)))
    assert len(ours) == 2
    for graph in ours:
        assert len(sites_of(graph)) == 1
        assert as_large_as_masks(graph, limit) == []
    if (kind, factor) == (Top2, TIGHT):
        written = graphs_of(model, x, Watched(Options.make({**EAGER, "fuel": 0})))
        assert all(as_large_as_masks(graph, limit) for graph in written)


@pytest.mark.parametrize("kind", P8)
def test_where_every_pair_has_a_seat_nothing_counts_them(kind):
    model, x, _ = made(kind, AMPLE)
    model.random = False  # a second choice that is dropped at random is compared with a threshold
    backend = Watched(Options.make(EAGER))
    forward, backward = graphs_of(model, x.requires_grad_(), backend)
    assert len(sites_of(forward)) == len(sites_of(backward)) == 1
    assert backend.words.isdisjoint(PLACES), backend.words


@pytest.mark.parametrize("kind", [Counted, KeptPairs])
def test_the_kernel_gets_the_pairs_that_are_kept_and_no_others(kind, monkeypatch):
    """So time is in proportion to the capacity factor, up to where nothing is dropped."""
    kept, seen, run = {}, [], twin.experts
    monkeypatch.setattr(twin, "experts", lambda x, w, choice, *rest: (seen.append(choice), run(x, w, choice, *rest))[1])
    for factor in (0.25, 0.5, 1.0, AMPLE):
        model, x, count = made(kind, factor)
        seats = max(1, round(2 * factor * count / E))
        chosen = model.choose(x)[1]
        per_expert = torch.bincount(chosen.reshape(-1), minlength=E)
        seen.clear()
        torch._dynamo.reset()
        torch.compile(model, backend=Backend(Options.make(EAGER)))(x)
        kept[factor] = int((seen[0] >= 0).sum())
        assert kept[factor] == int(per_expert.clamp(max=seats).sum())
        assert kept[factor] <= E * seats
    assert kept[AMPLE] == K * T
    assert kept[0.25] * 4 == kept[0.5] * 2 == K * T
