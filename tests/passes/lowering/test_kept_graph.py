"""A kept graph is put back whatever was done to its nodes; no collections while it is rewritten."""

import gc

import pytest
import torch
from torch import fx

from moec.passes.lowering.collector import no_collections
from moec.passes.lowering.kept_graph import KeptGraph, KeptModule


def traced():
    gm = fx.symbolic_trace(lambda x, y: torch.cat([x.relu() + 1, y], dim=-1).sum(dim=0))
    for node in gm.graph.nodes:
        node.meta["example_value"] = node.name
    return gm


def said(graph):
    return [(n.op, n.name, n.target, str(n.args), str(n.kwargs), dict(n.meta)) for n in graph.nodes]


def test_a_graph_is_restored_after_rewiring_erasing_and_renaming():
    gm = traced()
    before, x, y = said(gm.graph), torch.randn(3, 2), torch.randn(3, 4)
    expected = gm(x, y)
    kept = KeptGraph.of(gm.graph)

    relu = next(n for n in gm.graph.nodes if n.name == "relu")
    total = next(n for n in gm.graph.nodes if n.name == "sum_1")
    relu.replace_all_uses_with(relu.args[0])
    gm.graph.erase_node(relu)
    total.kwargs = {"dim": 1}
    total.meta.clear()
    gm.recompile()
    assert gm(x, y).shape != expected.shape

    gm.graph = kept.restored()
    gm.graph.lint()
    assert said(gm.graph) == before
    assert torch.equal(gm(x, y), expected)


def test_what_is_noted_beside_the_graph_is_put_back_too():
    gm = traced()
    gm.meta["mine"] = "kept"
    before, kept = said(gm.graph), KeptModule.of(gm)

    gm.meta |= {"mine": "changed", "context": "noted by a rewrite"}
    gm.graph.erase_node(next(reversed(gm.graph.nodes)))
    kept.put_back()
    assert gm.meta == {"mine": "kept"}
    assert said(gm.graph) == before


def test_restoring_twice_gives_equal_graphs_of_their_own():
    kept = KeptGraph.of(traced().graph)
    one, other = kept.restored(), kept.restored()
    assert said(one) == said(other)
    assert set(one.nodes).isdisjoint(other.nodes)


@pytest.mark.parametrize("enabled", [True, False])
def test_collections_are_off_within_and_as_before_afterwards(enabled):
    def collecting_inside():
        with no_collections():
            assert not gc.isenabled()
            raise ZeroDivisionError

    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError):
            collecting_inside()
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()
