"""From what the passes did to what people read: report entries, and names as the user wrote them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from moec import ir, report
from moec.graph import Graph, Instr
from moec.passes.lower import SITES
from moec.passes.raise_graph import Raised
from moec.passes.sites import experts_text, router_text, site_of
from moec.pipeline import Miss
from moec.site_text import dump_site
from moec.spec import KernelSpec
from moec.target import Target


def sites_of(raised: Raised, graph: Graph, misses: list[Miss], training: bool, engine: str, proofs: Mapping[str, str] | None = None) -> tuple[report.Site, ...]:
    """The report's sites, found and nearly found, in execution order."""
    order = graph.position
    proofs = proofs or {}
    apart = {m.value: m for m in misses}
    found = [
        (order[i.results[0]], _fused(raised, graph, i, apart.get(i.results[0]), training, engine, proofs))
        for i in graph.instrs
        if i.word in SITES
    ]
    roots = {i.results[0].removesuffix(".routed") for i in graph.instrs if i.word in SITES}
    declined = [
        (order.get(m.value, len(order)), _declined(raised, m))
        for m in misses
        if m.value.removesuffix(".routed") not in roots
    ]
    return tuple(site for _, site in sorted(found + declined, key=lambda pair: pair[0]))


def _fused(raised: Raised, graph: Graph, instr: Instr, apart: Miss | None, training: bool, engine: str, proofs: Mapping[str, str]) -> report.Site:
    name = site_name(raised, instr.results[0])
    site = site_of(graph, instr, name, training)
    spec = KernelSpec.parse(str(instr.attr("spec")))
    host = Target.host()
    made_by = "eager" if engine == "eager" or host.compiler is None else host.isa
    kernel = f"{instr.word}_{spec.experts.dtype}_{made_by}"
    reasons = (_reason(raised, apart),) if apart is not None else ()
    return report.Site(
        name=name,
        status="fused",
        form=site.form,
        router=router_text(graph, instr),
        experts=experts_text(instr),
        num_experts=int(site.num_experts),
        top_k=int(site.select.k),
        capacity="none: every choice is served",
        kernels=(kernel,),
        reasons=reasons,
        location=instr.loc,
        ir=dump_site(renamed(site, readable_names(raised))),
        spec=str(spec),
        proof=proofs.get(instr.results[0].removesuffix(".routed"), ""),
    )


def _declined(raised: Raised, miss: Miss) -> report.Site:
    return report.Site(
        name=site_name(raised, miss.value),
        status="declined",
        form="",
        router="",
        experts="",
        num_experts=0,
        top_k=0,
        capacity="",
        kernels=(),
        reasons=(_reason(raised, miss),),
        location=miss.loc,
    )


def _reason(raised: Raised, miss: Miss) -> report.Reason:
    """Why, at the line of the value that did not fit."""
    made = raised.graph.defs.get(miss.why.at)
    return report.Reason(miss.why.reason, location=(made.loc if made else "") or miss.loc, hint=miss.why.hint)


def site_name(raised: Raised, root: str) -> str:
    """'model.layers.3.mlp' where Dynamo knows the module, else the value's name."""
    base = root.removesuffix(".routed")
    node = next((node for node, since in raised.carriers.get(base, ()) if raised.order[node] == since), None)
    return (module_path(node) if node is not None else "") or base


def module_path(node: fx.Node) -> str:
    """The dotted path of the module whose code made the node, relative to what was compiled."""
    stack: Mapping[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path, kind = list(stack.values())[-1]
    return clean_path(path) or getattr(kind, "__name__", str(kind).rpartition(".")[2])


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
