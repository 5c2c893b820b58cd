"""Put sorted dispatch and one combine around a loop over experts, in torch's FX graph; the loop's body stays."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from moec.ir.graph import Ref
from moec.passes.canonical.canonicalize import twins
from moec.passes.dispatch.row_rules import RULES
from moec.passes.lowering.lower import Lowering, any_views
from moec.passes.opaque.dispatch import OpaqueSite
from moec.passes.opaque.rows import opaque_rows, varying
from moec.passes.raising.raise_graph import Raised, fake
from moec.passes.rows.lift import Lifter
from moec.passes.rows.rows import Rows, Slot, Token

_M = torch.ops.moec
_SKIPS = (_M.skip.default, _M.skip_size.default)


def dispatch(choice: Tensor, experts: int, k: int, slots_first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows in expert order: token[R] and flat slot[R] of each, start[E] and end[E] of each expert's rows.

    choice [T…, k], R = T·k; rows of one expert are ordered by (token, slot), or by (slot, token). Choices below 0
    or from `experts` on are no expert's and come last.
    """
    choice = torch.where(choice < 0, experts, choice).reshape(-1, k)
    flat = choice.t().reshape(-1) if slots_first else choice.reshape(-1)
    ordered, place = torch.sort(flat, stable=True)
    ids = torch.arange(experts, device=choice.device, dtype=choice.dtype)
    start = torch.searchsorted(ordered, ids)
    end = torch.searchsorted(ordered, ids, right=True)
    if slots_first and k > 1:
        tokens = max(choice.shape[0], 1)
        place = place % tokens * k + place // tokens
    return place // k, place, start, end


def combine(base: Tensor, token: Tensor, rows: Tensor, axes: int) -> Tensor:
    """base[t] + the sum of token t's rows; base [T…, …], token [R], rows [n ≤ R, …], in expert order."""
    total = base.flatten(0, axes - 1).index_add(0, token[: rows.shape[0]], rows.to(base.dtype))
    return total.view(base.shape)


def tokens(source: Tensor, token: Tensor, axes: int) -> Tensor:
    """The rows of tokens that lie on so many axes."""
    return source.flatten(0, axes - 1).index_select(0, token)


def slots(weights: Tensor, place: Tensor) -> Tensor:
    """weights [T, k] of each row."""
    return weights.reshape(-1)[place]


def sort_rows(gm: fx.GraphModule, raised: Raised, sites: tuple[OpaqueSite, ...]) -> tuple[OpaqueSite, ...]:
    """Change `gm` so that each site's rows are sorted once; the sites for which that could be done."""
    state = Lowering(gm, raised, "eager", any_views(raised.graph), twins(raised.graph, frozenset()))
    done = tuple(site for site in sites if site.form == "grouped" or _Loop(state, site).rewrite())
    if any(site.form != "grouped" for site in done):
        gm.graph.lint()
        gm.recompile()
    return done


class _Loop:
    """One loop, its nodes by what they do."""

    def __init__(self, state: Lowering, site: OpaqueSite) -> None:
        self.state, self.site, self.graph = state, site, state.gm.graph
        nodes = list(self.graph.nodes)
        self.anchor = next(n for n in nodes if n.name == site.anchor)
        after = nodes[nodes.index(self.anchor) :]
        self.end = next(n for n in after if n.target is _M.end.default)
        self.inside = after[: after.index(self.end)]
        self.at = state.raised.order[self.anchor]
        self.root = state.raised.graph.defs[site.root]

    def rewrite(self) -> bool:
        """Whether everything that is needed has a node of its own; then the loop is changed."""
        try:
            choice = self.before(self.site.choice)
            first = self.state.raised.graph.behind(self.root.args[0], ("carry",))
            assert isinstance(first, Ref)
            base = self.before(first.name)
            origin = self.named(self.site.root)
            rows = self.state.node(self.added(), self.state.raised.order[origin])
        except KeyError:
            return False
        if self.site.root in self.state.viewed or rows not in self.inside or origin not in self.inside:
            return False
        dispatched = self.dispatch(choice)
        self.cut(self.gathers(), dispatched)
        self.join(rows, base, dispatched[0], origin)
        return True

    def before(self, name: str) -> fx.Node:
        """The node that holds a value where the loop begins; KeyError where there is none."""
        return self.state.node(name, self.at - 1)

    def before_or_none(self, name: str) -> fx.Node | None:
        try:
            return self.before(name)
        except KeyError:
            return None

    def named(self, value: str) -> fx.Node:
        return next(n for n, since in self.state.raised.carriers[value] if self.state.raised.order[n] == since)

    def added(self) -> str:
        """The value that the root adds to tokens."""
        root, defs = self.root, self.state.raised.graph.defs
        if root.word != "index_put":
            return root.uses[2]
        if root.attr("accumulate"):
            return root.uses[1]
        made = defs[root.uses[1]]
        while made.word in ("same", "cast"):
            made = defs[made.uses[0]]
        old = [a for a in made.uses if a in defs and defs[a].word == "index" and defs[a].uses[0] == root.uses[0]]
        if made.word != "add" or not old:
            return root.uses[1]  # each token has one row, which is written
        return next(a for a in made.uses if a not in old[:1])

    def gathers(self) -> list[tuple[fx.Node, fx.Node, bool]]:
        """The nodes of the loop that gather rows, what they gather from, and whether that has a number a slot."""
        graph = self.state.raised.graph
        lifter = Lifter(graph, RULES, fallback=opaque_rows)
        found: list[tuple[fx.Node, fx.Node, bool]] = []
        by_name = {n.name: n for n in self.inside}
        for instr in graph.instrs:
            if instr.word != "index" or instr.results[0] not in varying(graph):
                continue
            held = lifter.lift_result(instr)
            if isinstance(held, Rows) and held.space.key == self.site.anchor and isinstance(held.row, Token | Slot):
                node = by_name.get(instr.results[0].partition(".")[0])
                source = self.before_or_none(held.row.value)
                if node is not None and source is not None:
                    found.append((node, source, isinstance(held.row, Slot) and self.a_slot(source)))
        return found

    def a_slot(self, source: fx.Node) -> bool:
        """Whether a value has one number for each slot; a choice [B, S] alone does not tell slots from tokens."""
        left = fake(source).shape[self.site.axes :]
        return all(isinstance(size, int) for size in left) and prod(left) == self.site.top_k

    def dispatch(self, choice: fx.Node) -> list[fx.Node]:
        """token, place, start, end, before the loop."""
        with self.graph.inserting_before(self.anchor):
            made = _known(
                self.graph.call_function(
                    dispatch, (choice, self.site.experts, self.site.top_k, self.site.order == "st")
                )
            )
            return [_known(self.graph.call_function(operator.getitem, (made, i))) for i in range(4)]

    def cut(self, gathers: list[tuple[fx.Node, fx.Node, bool]], dispatched: list[fx.Node]) -> None:
        """Each gather of an expert's rows becomes a slice of all rows, gathered once."""
        token, place, start, end = dispatched
        span = self.span(start, end)
        for node, source, of_slots in gathers:
            value = fake(node)
            with self.graph.inserting_before(self.anchor):
                fn: Callable[..., Any] = slots if of_slots else tokens
                args = (source, place) if of_slots else (source, token, self.site.axes)
                gathered = _known(self.graph.call_function(fn, args))
            with self.graph.inserting_before(node):
                piece: fx.Node = self.graph.call_function(operator.getitem, (gathered, span))
                piece.meta = dict(node.meta)
                if of_slots and value.dim() > 1:
                    piece = self.graph.call_method("reshape", (piece, -1, *value.shape[1:]))
                    piece.meta = dict(node.meta)
            node.replace_all_uses_with(piece)

    def span(self, start: fx.Node, end: fx.Node) -> fx.Node:
        """The places of the iteration's rows, at the head of the loop."""
        place = self.inside.index(self.anchor) + 1
        with self.graph.inserting_before([*self.inside, self.end][place]):
            item: fx.Node = self.anchor
            if fake(self.anchor).dim() != 0:
                item = self.graph.call_method("reshape", (self.anchor, ()))
            bounds = [self.graph.call_function(_M.take.default, (ends, item)) for ends in (start, end)]
            return self.graph.call_function(_M.span.default, tuple(bounds))

    def join(self, rows: fx.Node, base: fx.Node, token: fx.Node, origin: fx.Node) -> None:
        """The results of all experts are added to their tokens once, after the loop."""
        with self.graph.inserting_before(origin):  # rows may be updated in place until here
            collected = self.graph.call_function(_M.collect.default, (rows, self.anchor))
        collected.meta = dict(rows.meta)
        with self.graph.inserting_after(self.end):
            total = self.graph.call_function(combine, (base, token, collected, self.site.axes))
        total.meta = {**origin.meta, "example_value": fake(base)}
        self.state.made[self.site.root] = total  # a loop behind this one may add to it
        yields = [u for u in origin.users if u.target is _M.yield_.default]
        for user, holder in list(self.state.users(self.site.root, -1)):
            if user not in self.inside:
                user.replace_input_with(holder, total)
        for leave in yields:
            head = leave.args[0]
            leave.replace_all_uses_with(total)
            self.graph.erase_node(leave)
            if isinstance(head, fx.Node):
                head.replace_all_uses_with(base)
                self.graph.erase_node(head)
        self.graph.erase_node(origin)
        self.sweep()

    def sweep(self) -> None:
        """Remove what only the old dispatch needed."""
        ordered = (_M.anchor.default, _M.anchor_range.default, *_SKIPS)
        for node in reversed(self.inside):
            gone = node._erased
            if gone or node.users or node.target in ordered or node.op in ("placeholder", "get_attr"):
                continue
            if node.name in _effects(self.state.raised, self.inside):
                continue
            self.graph.erase_node(node)


def _known(node: fx.Node) -> fx.Node:
    """The node with its fake value: it may be handed from one compiled part of the graph to another."""
    assert callable(node.target)
    args = [fake(a) if isinstance(a, fx.Node) else a for a in node.args]
    values = args if not isinstance(args[0], tuple) else args[0]
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    with mode if mode is not None else nullcontext():
        node.meta["example_value"] = node.target(*args)
    return node


def _effects(raised: Raised, inside: list[fx.Node]) -> frozenset[str]:
    """The nodes of a loop that act by what they write."""
    from moec.passes.raising.updates import is_update
    from moec.passes.raising.words import key_of

    names = {i.results[0].partition(".")[0] for i in raised.graph.instrs if i.word in ("effect", "random", "turn")}
    writes = {n.name for n in inside if n.op.startswith("call") and is_update(n, key_of(n))}
    sets = {n.name for n in inside if n.target is operator.setitem}
    marks = {n.name for n in inside if n.target in (_M.yield_.default, _M.carry.default, _M.carry_int.default)}
    return frozenset(names | writes | sets | marks)
