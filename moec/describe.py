"""From what the passes did to what people read: site names, report entries."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import fx

from moec import report
from moec.graph import Graph, Instr
from moec.passes.lower import SITES
from moec.passes.raise_graph import Raised
from moec.passes.sites import experts_text, router_text, site_of
from moec.pipeline import Miss
from moec.site_text import dump_site
from moec.spec import KernelSpec


def sites_of(raised: Raised, graph: Graph, misses: list[Miss], training: bool, engine: str) -> tuple[report.Site, ...]:
    """The report's sites, found and nearly found, in execution order."""
    order = graph.position
    apart = {m.value: m for m in misses}
    found = [
        (order[i.results[0]], _fused(raised, graph, i, apart.get(i.results[0]), training, engine))
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


def _fused(raised: Raised, graph: Graph, instr: Instr, apart: Miss | None, training: bool, engine: str) -> report.Site:
    name = site_name(raised, instr.results[0])
    site = site_of(graph, instr, name, training)
    spec = KernelSpec.parse(str(instr.attr("spec")))
    kernel = f"{'moe' if instr.word == 'moe' else 'experts'}_{spec.experts.dtype}_{engine}"
    reasons = (_reason(apart),) if apart is not None else ()
    return report.Site(
        name=name,
        status="fused",
        form=site.form,
        router=router_text(instr),
        experts=experts_text(instr),
        num_experts=int(site.num_experts),
        top_k=int(site.select.k),
        capacity="none: every choice is served",
        kernels=(kernel,),
        reasons=reasons,
        location=instr.loc,
        ir=dump_site(site),
        spec=str(spec),
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
        reasons=(_reason(miss),),
        location=miss.loc,
    )


def _reason(miss: Miss) -> report.Reason:
    return report.Reason(miss.why.reason, location=miss.loc, hint=miss.why.hint)


def site_name(raised: Raised, root: str) -> str:
    """'model.layers.3.mlp' where Dynamo knows the module, else the value's name."""
    base = root.removesuffix(".routed")
    node = next((node for node, since in raised.carriers.get(base, ()) if raised.order[node] == since), None)
    path = module_path(node) if node is not None else ""
    return path or base


def module_path(node: fx.Node) -> str:
    """The dotted path of the module whose code made the node, relative to what was compiled."""
    stack: Mapping[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
    paths = [clean_path(path) for path, _ in stack.values()]
    return paths[-1] if paths else ""


def clean_path(path: str) -> str:
    """L['self'].model.layers[3].mlp → model.layers.3.mlp."""
    path = re.sub(r"^L\[['\"]\w+['\"]\]\.?", "", path)
    path = re.sub(r"_modules\[['\"](\w+)['\"]\]", r"\1", path)
    return re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path).strip(".")
