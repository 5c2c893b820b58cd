"""From what the passes did to what people read: report entries, and names as the user wrote them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from moec import report
from moec.capture.state import current_tx
from moec.ir import site as ir
from moec.ir.dims import dim_text
from moec.ir.engine import only_for_triton
from moec.ir.graph import Graph, Instr, Ref
from moec.ir.site_text import dump_site
from moec.ir.spec import KernelSpec
from moec.ir.token_range import TokenRange
from moec.passes.lowering.lower import SITES, shape_env
from moec.passes.opaque.dispatch import OpaqueSite
from moec.passes.raising.raise_graph import Raised
from moec.passes.reports.candidates import Candidate
from moec.passes.reports.near_miss import (
    NearMiss,
    banks_text,
    chosen_text,
    chosen_values,
    counts_of,
    near_misses,
    place_of,
)
from moec.passes.reports.places import place
from moec.passes.reports.sites import experts_text, router_text, site_of
from moec.pipeline import Facts, Miss
from moec.proof.store import Verdict
from moec.target import Target


@dataclass(frozen=True)
class Described:
    """What people read about one graph: its MoE layers, and every region that was looked at."""

    sites: tuple[report.Site, ...]
    regions: tuple[report.Region, ...]


def describe(
    raised: Raised, graph: Graph, misses: Sequence[Miss], facts: Facts, proofs: Mapping[str, str] | None = None
) -> Described:
    """The sites of a graph, found and nearly found, and its candidates, in execution order."""
    proofs = proofs or {}
    roots = {i.results[0].removesuffix(".routed") for i in graph.instrs if i.word in SITES}
    left = [m for m in misses if m.value.removesuffix(".routed") not in roots]
    candidates, near = near_misses(graph, facts, left, parameters(raised))
    order = graph.position
    found = [(order[i.results[0]], site) for i, site in _fused_sites(raised, graph, misses, facts, proofs)]
    found += [(order.get(n.miss.value, len(order)), _declined(raised, graph, n)) for n in near]
    sites = tuple(site for _, site in sorted(found, key=lambda pair: pair[0]))
    missed = {id(n.candidate): n for n in near}
    return Described(sites, tuple(_region(raised, graph, c, missed.get(id(c))) for c in candidates))


def parameters(raised: Raised) -> frozenset[str]:
    """The inputs that Dynamo found as a module's own tensors; none where it does not say."""
    return frozenset(
        node.name
        for node in raised.order
        if node.op == "get_attr" or re.search(r"_(parameters|buffers)\b", _source(node)) is not None
    )


def _source(node: fx.Node) -> str:
    source = getattr(node.meta.get("grapharg"), "source", None)
    return source.name if source is not None else ""


def _fused_sites(
    raised: Raised, graph: Graph, misses: Sequence[Miss], facts: Facts, proofs: Mapping[str, str]
) -> Iterator[tuple[Instr, report.Site]]:
    apart = {m.value: m for m in misses}
    for instr in graph.instrs:
        if instr.word in SITES:
            why = apart.get(instr.results[0])
            yield instr, _fused(raised, graph, instr, why, facts, proofs)


def _region(raised: Raised, graph: Graph, candidate: Candidate, near: NearMiss | None) -> report.Region:
    """A candidate for people."""
    status = {"open": "declined"}.get(candidate.status, candidate.status) if near is None else "declined"
    why = candidate.why if near is None else near.miss.why.reason
    return report.Region(
        name=site_name(raised, candidate.root),
        status=status,
        chosen=chosen_text(candidate) if candidate.selections else "–",
        experts=banks_text(candidate) if candidate.banks else "–",
        why=why,
        location=place_of(graph, candidate),
    )


def _fused(
    raised: Raised,
    graph: Graph,
    instr: Instr,
    apart: Miss | None,
    facts: Facts,
    proofs: Mapping[str, str],
) -> report.Site:
    name = site_name(raised, instr.results[0])
    site = site_of(graph, instr, name, bool(facts.grad))
    spec = KernelSpec.parse(str(instr.attr("spec")))
    kernel = f"{instr.word}_{spec.experts.dtype}_{_maker(instr, facts)}"
    reasons = (_reason(raised, apart),) if apart is not None else ()
    return report.Site(
        name=name,
        status="fused",
        form=site.form,
        router=router_text(graph, instr),
        experts=experts_text(graph, instr),
        num_experts=int(site.num_experts),
        top_k=int(site.select.k) if site.select.k.is_Integer else 0,  # a symbol, where choices come as an input
        capacity=capacity_text(site.capacity),
        kernels=(kernel,),
        reasons=reasons,
        location=instr.loc,
        ir=dump_site(renamed(site, readable_names(raised))),
        spec=str(spec),
        proof=proofs.get(instr.results[0], ""),
        tokens=facts.options.tokens or str(TokenRange.of_dim(instr.types[0].shape[0], shape_env(raised)) or ""),
    )


def _maker(instr: Instr, facts: Facts) -> str:
    """Who computes a site: triton, the C++ kernels' instruction set (and own copy of the weights, if any), or eager."""
    params = instr.args[-1]
    assert isinstance(params, tuple)
    on_cpu = all(facts.devices.get(ref.name, "cpu") == "cpu" for ref in params if isinstance(ref, Ref))
    engine, host = facts.options.kernels, Target.host()
    if engine == "triton" or (engine == "auto" and not on_cpu):
        return "triton"
    if engine == "eager" or not host.compiler:
        return "eager"
    weights = facts.options.engine(training=bool(facts.grad)).weights
    return host.isa if weights == "stored" or only_for_triton(weights) else f"{host.isa}_{weights}"


def capacity_text(capacity: ir.Capacity | None) -> str:
    """How many rows an expert may get, for people."""
    if capacity is None:
        return "none: every choice is served"
    if capacity.order == "score":
        return f"{dim_text(capacity.limit)} rows an expert: the tokens that it scores best"
    groups = "" if capacity.queues == 1 else f" in each of {dim_text(capacity.queues)} groups of tokens"
    others = "proved to be enough for every choice" if capacity.drop == "never" else "the others are dropped"
    return f"{dim_text(capacity.limit)} rows an expert{groups}, by {capacity.order}; {others}"


def _declined(raised: Raised, graph: Graph, near: NearMiss) -> report.Site:
    experts, top_k = counts_of(near.candidate)
    return report.Site(
        name=site_name(raised, near.miss.value),
        status="declined",
        form="",
        router=chosen_text(near.candidate) if near.candidate.selections else "",
        experts=banks_text(near.candidate),
        num_experts=experts,
        top_k=top_k,
        capacity="",
        kernels=(),
        reasons=(_reason(raised, near.miss),),
        location=place_of(graph, near.candidate),
        checks=near.checks,
        choice=tuple(filter(None, (_node_name(raised, value) for value in chosen_values(near.candidate)))),
    )


def _node_name(raised: Raised, value: str) -> str:
    """The FX node that first held a value."""
    return next((node.name for node, _ in raised.carriers.get(value, ())), "")


def _reason(raised: Raised, miss: Miss) -> report.Reason:
    """Why, at the line of the value that did not fit."""
    own = place(raised.graph, miss.why.at) if miss.why.at else ""
    where = own or miss.loc or place(raised.graph, miss.value.removesuffix(".routed"))
    return report.Reason(miss.why.reason, location=where, hint=miss.why.hint)


def site_name(raised: Raised, root: str) -> str:
    """'model.layers.3.mlp' where Dynamo knows the module, else the value's name."""
    base = root.removesuffix(".routed")
    node = next((node for node, since in raised.carriers.get(base, ()) if raised.order[node] == since), None)
    return (module_path(node) if node is not None else "") or base


def layers_of(raised: Raised, graph: Graph) -> tuple[str, ...]:
    """The names of the layers that have ops of moec's, in execution order."""
    return tuple(site_name(raised, i.results[0]) for i in graph.instrs if i.word in SITES)


def module_path(node: fx.Node) -> str:
    """The dotted path of the module whose code made the node, relative to what was compiled."""
    stack: Mapping[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
    if not stack:
        return _compiled_class()
    path, kind = list(stack.values())[-1]
    return clean_path(path) or getattr(kind, "__name__", str(kind).rpartition(".")[2])


def _compiled_class() -> str:
    """The class of the module whose own forward is compiled, of which Dynamo notes no path; '' for a function."""
    tx = current_tx()
    owner = tx.output.root_tx.f_locals.get("self") if tx is not None else None
    return type(owner).__name__ if isinstance(owner, nn.Module) else ""


def clean_path(path: str) -> str:
    """L['self'].model.layers[3].mlp → model.layers.3.mlp; L['x'] → x."""
    local = re.fullmatch(r"L\[['\"](\w+)['\"]\]", path)
    if local is not None and local[1] != "self":
        return local[1]
    path = re.sub(r"^L\[['\"]\w+['\"]\]\.?", "", path)
    path = path.replace("_modules", "")
    return re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path).replace("..", ".").strip(".")


def readable_names(raised: Raised) -> dict[str, str]:
    """Parameters by their own names: `l_self_modules_experts_parameters_up_` → `experts.up`."""
    names: dict[str, str] = {}
    for node in raised.order:
        source = getattr(node.meta.get("grapharg"), "source", None)
        path = (
            clean_path(source.name.replace("_parameters", "_modules").replace("_buffers", "_modules")) if source else ""
        )
        if node.op == "placeholder" and path:
            names[node.name] = path
    return names if len(set(names.values())) == len(names) else {}


def renamed(site: ir.Site, names: Mapping[str, str]) -> ir.Site:
    """The site with readable names for its input and parameters."""

    def new(name: str) -> str:
        return names.get(name, name)

    params = tuple((role, tuple(map(new, values))) for role, values in site.body.params)
    return replace(
        site,
        x=new(site.x),
        score=replace(site.score, weight=new(site.score.weight), bias=new(site.score.bias)),
        select=replace(site.select, bias=new(site.select.bias)),
        body=replace(site.body, params=params),
    )


def with_ranks(said: Described, over: Sequence[str]) -> Described:
    """What is said, with the ranks of each layer whose rows moec's op exchanges, in order, and why others have none."""
    left, sites = iter(over), list[report.Site]()
    for site in said.sites:
        why = "its experts run code of their own" if site.status == "fused" else "the layer is not fused"
        kept = f"not spread: {why}; each rank computes its own tokens with all experts"
        sites.append(replace(site, ranks=next(left) if site.status == "fused" and site.spec else kept))
    return replace(said, sites=tuple(sites))


@dataclass(frozen=True)
class Sorted:
    """A loop over experts with code of their own, what its proof has shown, and why its rows are not sorted, if so."""

    site: OpaqueSite
    verdict: Verdict
    refused: str = ""


def with_opaque(said: Described, bodies: Sequence[Sorted], raised: Raised) -> Described:
    """What is said, with experts that run their own code on slices of sorted rows in the place of their misses."""
    sites, regions = list(said.sites), list(said.regions)
    for body in bodies:
        loc, status = body.site.loc, "declined" if body.refused else "fused"
        at = next((i for i, s in enumerate(sites) if (s.status, s.location) == ("declined", loc)), len(sites))
        sites[at : at + 1] = [_opaque(raised, body, status)]
        for i, region in enumerate(regions):
            if (region.status, region.location) == ("declined", loc):
                regions[i] = replace(region, status=status, why=body.refused)
                break
    return Described(tuple(sites), tuple(regions))


def _opaque(raised: Raised, body: Sorted, status: str) -> report.Site:
    site, why = body.site, body.refused
    hint = (
        "the loop runs as it was written; a refused rewrite is a bug to report, one that is not tried needs proof='on'"
    )
    how = "in the loop that was written" if why else "on slices of sorted rows"
    return report.Site(
        name=site_name(raised, site.root),
        status=status,
        form=site.form,
        router="the model's own (in the graph)",
        experts=f"{site.experts} × own code ({', '.join(site.body)}) {how}",
        num_experts=site.experts,
        top_k=site.top_k,
        capacity="none: every choice is served",
        kernels=() if why else ("sorted_dispatch", "combine"),
        reasons=(report.Reason(why, location=site.loc, hint=hint),) if why else (),
        location=site.loc,
        choice=tuple(filter(None, (_node_name(raised, site.choice),))),
        proof="" if why else str(body.verdict),
        checks=(report.Check("sorting its rows changes nothing", False, why, site.loc),) if why else (),
    )
