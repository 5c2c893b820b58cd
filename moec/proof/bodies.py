"""Experts with code of their own, as a rewrite that can be tried: the loop as it was written, and the same loop with
its rows sorted. The second is made from a copy of the first, by the code that changes the user's graph.

What the loop updates besides its result (counts, running means) is compared too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx, nn

from moec.capture.effects import root, written
from moec.capture.region import Region
from moec.ir.graph import Instr
from moec.passes.lowering.kept_graph import KeptGraph
from moec.passes.opaque.dispatch import OpaqueSite
from moec.passes.opaque.lower import sort_rows
from moec.passes.raising.raise_graph import Raised
from moec.passes.raising.vocabulary import raise_fx
from moec.proof.copying import Copy, Leaf, Source, Unprovable
from moec.proof.region import Half, Pair, computed_from, is_distinct, signed, source_of


@dataclass(frozen=True)
class Bodies:
    """The loops of one graph whose rows are to be sorted; `grad` names the values that need a gradient."""

    gm: fx.GraphModule
    raised: Raised
    grad: frozenset[str]

    @cached_property
    def source(self) -> Source:
        """The graph, as what is copied from."""
        return source_of(self.gm, self.raised, self.grad)

    def pair(self, site: OpaqueSite) -> Pair:
        """The loop as it is and with its rows sorted; raises Unprovable."""
        region = next(r for r in self.source.loops if r.anchor.name == site.anchor)
        values = self.raised.graph
        holder = values.types[site.choice], next(node for node, _ in self.raised.carriers[site.choice])
        choice = Leaf(site.choice, "choice", *holder)
        same = (site.choice, *self.source.lowering.twins.get(site.choice, ()))
        outputs = (site.root, *(name for name in self._left(region) if name != site.root))
        within = self._inside(region) | computed_from(values, same, max(outputs, key=values.position.__getitem__))
        copy = Copy(self.source, dict.fromkeys(same, choice))
        copy.graph.output(copy.values(outputs, within))
        _join_leaves(copy)
        leaves = tuple(signed(values, leaf) for leaf in copy.leaves.values())
        attrs = (("experts", site.experts),)
        return Pair(
            site.root,
            Half(copy.graph, copy.feeds),
            Half(_sorted(copy, site), copy.feeds),
            leaves,
            outputs,
            Instr((site.root,), "bodies", (), (), attrs, site.loc),
            is_distinct(values, site.choice),
            self.grad,
        )

    def _inside(self, region: Region) -> frozenset[str]:
        """The values that an iteration makes."""
        made = {region.anchor.name, *(node.name for node in region.nodes)}
        return frozenset(name for name in self.raised.graph.defs if name.partition(".")[0] in made)

    def _left(self, region: Region) -> Iterator[str]:
        """The values that the loop leaves behind: what it adds to, hands on to the next iteration, and collects."""
        at, lowering = self.source.position(region.end), self.source.lowering
        leaves = (*region.accumulators, *(leave for _, leave in region.carries), *region.collects)
        for node in leaves:
            name = lowering.holds(node, at)
            if name in self.raised.graph.defs:
                yield name


def _join_leaves(copy: Copy) -> None:
    """One placeholder a leaf that nothing writes to: the sorted loop must see one choice, not several equal ones.

    What is written to and begins as another leaf is a copy of that: `y = x.clone(); y[rows] = x[rows] + …` adds.
    """
    changed = {root(tensor) for node in copy.graph.nodes for tensor in written(node)}
    first: dict[str, fx.Node] = {}
    for node in list(copy.graph.nodes):
        if node.op != "placeholder" or node in changed:
            continue
        kept = first.setdefault(copy.feeds[node.name], node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            del copy.feeds[node.name]
            copy.graph.erase_node(node)
    for node in changed:
        kept = first.get(copy.feeds.get(node.name, ""))
        if node.op == "placeholder" and kept is not None:
            with copy.graph.inserting_after(_last_given(copy.graph)):
                begun = copy.graph.call_method("clone", (kept,))
            begun.meta = dict(node.meta)
            node.replace_all_uses_with(begun)
            del copy.feeds[node.name]
            copy.graph.erase_node(node)


def _last_given(graph: fx.Graph) -> fx.Node:
    return next(node for node in reversed(list(graph.nodes)) if node.op == "placeholder")


def _sorted(copy: Copy, site: OpaqueSite) -> fx.Graph:
    """A copy of the copy, rewritten."""
    made = fx.GraphModule(nn.Module(), KeptGraph.of(copy.graph).restored())
    choice = next((name for name, leaf in copy.feeds.items() if leaf == site.choice), "")
    if not sort_rows(made, raise_fx(made), (replace(site, choice=choice),)):
        raise Unprovable("the loop cannot be copied out of its graph")
    return made.graph
