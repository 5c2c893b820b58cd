"""Record which experts a model's tokens go to while it runs, layer by layer, fused or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from moec.backend import Backend
from moec.loading import Target
from moec.loads import Load
from moec.options import Options
from moec.report import GraphReport, Report, Site

_OPS = torch.ops.moec
Batch = tuple[Sequence[Any], Mapping[str, Any]]


@dataclass
class Tally:
    """What was recorded of one layer: a row of counts for each of its runs."""

    site: str
    location: str
    experts: int
    tokens: int = 0
    k: int = 1
    batches: list[list[int]] = field(default_factory=list[list[int]])

    def add(self, chosen: Sequence[Tensor]) -> None:
        """chosen: i64[T, k], or k times i64[T]."""
        ids = [c.detach().reshape(len(c), -1) if c.dim() else c.reshape(1, 1) for c in chosen]
        flat = torch.cat(ids, dim=1)
        counts = torch.bincount(flat.reshape(-1).cpu(), minlength=self.experts)
        self.tokens += flat.shape[0]
        self.k = max(flat.shape[1], 1)
        self.batches.append([int(n) for n in counts[: self.experts]])


@dataclass(frozen=True)
class Recorder(Backend):
    """moec's backend with a tap on every choice of experts; what is not MoE runs eagerly."""

    tallies: list[Tally] = field(default_factory=list[Tally])

    __moec_backend__ = True

    def rewrite(self, gm: fx.GraphModule, nested: bool = False) -> GraphReport:
        """As the backend, then a tap behind every fused layer's routing and every declined layer's choice."""
        done = super().rewrite(gm, nested)
        by_name = {node.name: node for node in gm.graph.nodes}
        ops = [n for n in gm.graph.nodes if n.target in (_OPS.moe.default, _OPS.experts.default)]
        fused = [site for site in done.sites if site.status == "fused"]
        names = _names(done.sites)
        for site, node in zip(fused, ops, strict=True):
            self._tap_op(gm, self._tally(site, names), node)
        for site in done.sites:
            nodes = [by_name[name] for name in site.choice if name in by_name]
            if site.status != "fused" and nodes and len(nodes) == len(site.choice):
                self._tap_choice(gm, self._tally(site, names), nodes)
        gm.graph.lint()
        gm.recompile()
        return done

    def _tally(self, site: Site, names: Mapping[int, str]) -> Tally:
        self.tallies.append(Tally(names[id(site)], site.location, site.num_experts))
        return self.tallies[-1]

    def _tap_op(self, gm: fx.GraphModule, tally: Tally, node: fx.Node) -> None:
        if node.target is _OPS.moe.default:
            with gm.graph.inserting_after(node):
                tap = gm.graph.call_function(_tap_results(tally), (node,))
            node.replace_all_uses_with(tap, delete_user_cb=lambda user: user is not tap)
            return
        with gm.graph.inserting_before(node):
            tap = gm.graph.call_function(_tap_ids(tally), (node.args[2],))
        node.update_arg(2, tap)

    def _tap_choice(self, gm: fx.GraphModule, tally: Tally, nodes: list[fx.Node]) -> None:
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        last = max(nodes, key=order.__getitem__)
        with gm.graph.inserting_after(last):
            tap = gm.graph.call_function(_tap_ids(tally), tuple(nodes))
        tap.meta.update({k: v for k, v in nodes[0].meta.items() if k in ("example_value", "stack_trace")})
        nodes[0].replace_all_uses_with(
            tap, delete_user_cb=lambda user: user is not tap and order.get(user, -1) > order[last]
        )


def _names(sites: Sequence[Site]) -> dict[int, str]:
    """A name of its own for each site of a graph: one module called twice is two layers."""
    times: dict[str, int] = {}
    names: dict[int, str] = {}
    for site in sites:
        times[site.name] = times.get(site.name, 0) + 1
        names[id(site)] = site.name if times[site.name] == 1 else f"{site.name}#{times[site.name]}"
    return names


def _tap_results(tally: Tally) -> Callable[[Any], Any]:
    def tap(results: Any) -> Any:
        tally.add([results[3]])
        return results

    return tap


def _tap_ids(tally: Tally) -> Callable[..., Tensor]:
    def tap(*chosen: Tensor) -> Tensor:
        tally.add(chosen)
        return chosen[0]

    return tap


def record(target: Target, batches: Sequence[Batch], options: Options) -> tuple[tuple[Load, ...], Report]:
    """Run the model once for each batch of (args, kwargs); loads by layer in execution order, and the report."""
    report = Report()
    recorder = Recorder(replace(options, rest="eager"), report=report)
    torch._dynamo.reset()
    compiled = torch.compile(target.model, backend=recorder)
    with torch.no_grad():
        for args, kwargs in batches:
            compiled(*args, **kwargs)
    return tuple(_merged(recorder.tallies)), report


def _merged(tallies: Sequence[Tally]) -> list[Load]:
    """One load a layer; another shape of input is another graph of the same layer."""
    found: dict[tuple[str, str, int, int], Load] = {}
    for tally in tallies:
        if not tally.batches:
            continue
        key = (tally.site, tally.location, tally.k, tally.experts)
        old = found.get(key)
        batches = (*(old.batches if old else ()), *map(tuple, tally.batches))
        found[key] = Load(tally.site, tally.tokens + (old.tokens if old else 0), tally.k, tally.experts, batches)
    return list(found.values())
