"""Find the router behind each group of experts, and make both one instruction where nothing forbids it.

    %y = experts(%x, %w, %e, (…))   →   %y, %y.logits, %y.weights, %y.experts = moe(%x, (%gate, …), (…)) spec=… k=…

Experts are found first: a top-k is a router only by what its choice is used for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy

from moec.ir.dims import Dim
from moec.ir.graph import Attr, Graph, Instr, Ref, Type, substitute, sweep
from moec.ir.match import NoMatch
from moec.ir.spec import KernelSpec, RouterSpec
from moec.passes.routers.routing import RouterMatch, match_router, uncast
from moec.pipeline import Facts, Miss, Outcome


@dataclass(frozen=True)
class _Edit:
    """What takes a site's place, and what the values that it makes itself are called after it."""

    made: Instr
    renamed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class FindRouters:
    """Say each understood router in its experts' instruction; a router that cannot be fused is described there."""

    name: str = "find-routers"

    def run(self, graph: Graph, facts: Facts) -> Outcome:
        """The graph with routers fused, and why the others were not."""
        misses: list[Miss] = []
        fused: list[str] = []
        edits: dict[str, _Edit] = {}
        taken: set[str] = set()
        for root in [i.results[0] for i in graph.instrs if i.word == "experts"]:
            # Sites are decided on one graph, which is made anew only where one reads what another will make.
            if not taken.isdisjoint(graph.defs[root].uses):
                graph, edits, taken = _applied(graph, edits), {}, set()
            site = graph.defs[root]
            match = match_router(graph, site.uses[1], site.uses[2])
            done = _fuse(graph, facts, site, match) if isinstance(match, RouterMatch) else match
            if isinstance(done, _Edit) and facts.out_of_fuel(len(fused)):
                done = NoMatch("rewrite fuel is spent", root)
            if isinstance(done, NoMatch):
                misses.append(Miss(root, site.loc, done))
                done = _described(site, match, done)
            else:
                fused.append(root)
            edits[root] = done
            taken |= {old for old, _ in done.renamed}
        return Outcome(sweep(_applied(graph, edits)), len(fused), tuple(misses), tuple(fused))


def _applied(graph: Graph, edits: Mapping[str, _Edit]) -> Graph:
    """The graph with all edits made, in one walk."""
    later: dict[str, str] = {}
    instrs: list[Instr] = []
    for instr in graph.instrs:
        edit = edits.get(instr.results[0]) if instr.results else None
        instrs += substitute([edit.made if edit else instr], later)
        later |= dict(edit.renamed) if edit else {}
    return replace(graph, instrs=tuple(instrs), outputs=tuple(later.get(name, name) for name in graph.outputs))


def _described(site: Instr, match: RouterMatch | NoMatch, why: NoMatch) -> _Edit:
    """The site saying what its router is and why it stays apart."""
    apart: tuple[tuple[str, Attr], ...] = (("router_apart", why.reason),)
    if isinstance(match, RouterMatch):
        spec = replace(KernelSpec.parse(str(site.attr("spec"))), router=match.spec)
        apart = (*apart, ("router", str(spec)), ("router_params", match.params))
    return _Edit(replace(site, attrs=(*site.attrs, *apart)))


def _fuse(graph: Graph, facts: Facts, site: Instr, match: RouterMatch) -> _Edit | NoMatch:
    """`site` and its router as one `moe` instruction."""
    x, weights, choice = site.uses[:3]
    if uncast(graph, x) != match.x and x != match.x:
        return NoMatch(f"the router reads %{match.x}, the experts read %{x}", site.results[0])
    if facts.grad.intersection((*site.uses, *match.params)):  # experts may be all that is trained
        return NoMatch("training: the router stays in the graph, where autograd differentiates it", site.results[0])
    if graph.types[x].dtype != graph.types[match.x].dtype:
        return NoMatch("the router reads the token in another dtype than the experts", site.results[0])
    outputs, count = graph.types[match.logits].shape[-1], _experts(graph, site)
    if outputs != count:
        return NoMatch(f"the router has {outputs} outputs for {count} experts", site.results[0])
    where = graph.position[site.results[0]]
    replaced = (weights, choice, match.logits)
    for value in replaced:
        early = [
            u
            for u in graph.users.get(value, ())
            if graph.position[u.results[0]] < where and _outside(graph, u, site, replaced)
        ]
        if early:
            return NoMatch(f"%{value} is used before the experts run, at {early[0].loc or early[0].word}", value)
    return _one(graph, site, match)


def _experts(graph: Graph, site: Instr) -> Dim:
    """E of a site's parameters."""
    spec, params = KernelSpec.parse(str(site.attr("spec"))).experts, site.args[3]
    assert isinstance(params, tuple)
    if not spec.stacked:
        return sympy.Integer(len(params) // len(spec.param_groups))
    first = params[0]
    assert isinstance(first, Ref)
    return graph.types[first.name].shape[0]


def _outside(graph: Graph, user: Instr, site: Instr, replaced: Sequence[str]) -> bool:
    """Whether an early user of a router's value has an effect besides the site's own routing.

    Values that the site will make itself may be results of the graph: they come from there then.
    """
    pending, seen = [user], set[str]()
    while pending:
        instr = pending.pop()
        if instr is site or instr.word == "assert":
            continue
        if instr.results[0] in seen:
            continue
        seen.add(instr.results[0])
        others = [r for r in instr.results if r not in replaced]
        if instr.word in ("effect", "random") or any(r in graph.outputs for r in others):
            return True
        pending.extend(u for r in others for u in graph.users.get(r, ()))
    return False


def _one(graph: Graph, site: Instr, match: RouterMatch) -> _Edit:
    root, old = site.results[0], KernelSpec.parse(str(site.attr("spec")))
    spec = replace(old, router=match.spec)
    weights, choice = site.uses[1], site.uses[2]
    results = (root, f"{root}.logits", f"{root}.weights", f"{root}.experts")
    types: tuple[Type, ...] = (site.types[0], *(graph.types[v] for v in (match.logits, weights, choice)))
    args = (Ref(site.uses[0]), tuple(map(Ref, match.params)), site.args[3])
    attrs = tuple((name, str(spec) if name == "spec" else value) for name, value in site.attrs)
    replaced = (match.logits, weights, choice)
    moe = Instr(results, "moe", args, types, (*attrs, ("k", match.k), ("replaces", replaced)), site.loc)
    return _Edit(moe, tuple(zip(replaced, results[1:], strict=True)))


def describe(spec: RouterSpec, k: int) -> str:
    """The router in a few words."""
    parts = [f"{spec.score_text} ({spec.score_dtype})" if spec.score != "logits" else "logits"]
    if spec.selection_bias:
        parts.append("+ selection bias")
    if spec.groups > 1:
        parts.append(f"best {spec.topk_group} of {spec.groups} groups")
    parts.append(f"top-{k}")
    if spec.softmax_over_k:
        parts.append("softmax over the chosen")
    if spec.renormalize:
        parts.append("renormalised")
    if spec.scale != 1.0:
        parts.append(f"× {spec.scale:g}")
    return ", ".join(parts).replace(", + ", " + ")
