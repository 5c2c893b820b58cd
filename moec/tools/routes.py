"""Record which experts a model's tokens go to while it runs, layer by layer, fused or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, fx

from moec.backend import Backend
from moec.options import Options
from moec.own_error import own_errors
from moec.report import GraphReport, Report, Site
from moec.sizing.angles import QUANTILES, Angles
from moec.sizing.loads import Load
from moec.tools.loading import Target

_OPS = torch.ops.moec
Batch = tuple[Sequence[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Seen:
    """Angles in one run of a layer: D channels, cosines of tokens to chosen gates f32[T·k], the largest of gates."""

    channels: int
    cosines: Tensor
    gates: float


def seen_angles(x: Tensor, router: Tensor, chosen: Tensor) -> Seen:
    """x[T, D], the router's weight[E, D], chosen experts i64[T, k]."""
    tokens, gates = nnf.normalize(x.float(), dim=-1), nnf.normalize(router.float(), dim=-1)
    between = (gates @ gates.t()).abs().fill_diagonal_(0)
    cosines = (tokens @ gates.t()).gather(-1, chosen).reshape(-1)
    return Seen(x.shape[-1], cosines.cpu(), float(between.max()))


@dataclass
class Tally:
    """What was recorded of one layer: a row of counts for each of its runs, and what its first `keep` tokens chose."""

    site: str
    location: str
    experts: int
    keep: int = 0
    tokens: int = 0
    k: int = 1
    batches: list[list[int]] = field(default_factory=list[list[int]])
    seen: list[Seen] = field(default_factory=list[Seen])
    choices: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])

    def add(self, chosen: Sequence[Tensor]) -> None:
        """chosen: i64[T, k], or k times i64[T]; a number that is no expert's (-1, say) is a slot that nobody serves."""
        ids = [c.detach().reshape(len(c), -1) if c.dim() else c.reshape(1, 1) for c in chosen]
        flat = torch.cat(ids, dim=1).cpu()
        served = (flat >= 0) & (flat < self.experts)
        self.tokens += flat.shape[0]
        self.k = max(flat.shape[1], 1)
        self.batches.append(torch.bincount(flat[served], minlength=self.experts).tolist())
        for row, kept in zip(flat[: max(self.keep - len(self.choices), 0)], served, strict=False):
            self.choices.append(tuple(row[kept].tolist()))


def angles_of(seen: Sequence[Seen]) -> Angles | None:
    """The angles of all runs of one layer; None where the router's weight was not seen."""
    cosines = torch.cat([s.cosines for s in seen]).double() if seen else torch.empty(0)
    if not cosines.numel() or seen[0].channels < 2:
        return None
    ordered = cosines.sort().values
    at = [ordered[int(q * (len(ordered) - 1))].item() for q in QUANTILES]
    return Angles(seen[0].channels, len(ordered), tuple(at), max(s.gates for s in seen))


@dataclass(frozen=True)
class Recorder(Backend):
    """moec's backend with a tap on every choice of experts; what is not MoE runs eagerly."""

    tallies: list[Tally] = field(default_factory=list[Tally])
    keep: int = 0

    __moec_backend__ = True

    def rewrite(self, gm: fx.GraphModule, nested: bool = False) -> GraphReport:
        """As the backend, then a tap behind every fused layer's routing and every declined layer's choice."""
        done = super().rewrite(gm, nested)
        by_name = {node.name: node for node in gm.graph.nodes}
        ops = [n for n in gm.graph.nodes if n.target in (_OPS.moe.default, _OPS.experts.default)]
        fused = [site for site in done.sites if site.spec]  # others that are fused run their own code, and have no op
        names = _names(done.sites)
        for site, node in zip(fused, ops, strict=True):
            self._tap_op(gm, self._tally(site, names), node)
        for site in done.sites:
            nodes = [by_name[name] for name in site.choice if name in by_name]
            if not site.spec and nodes and len(nodes) == len(site.choice):
                self._tap_choice(gm, self._tally(site, names), nodes)
        gm.graph.lint()
        gm.recompile()
        return done

    def _tally(self, site: Site, names: Mapping[int, str]) -> Tally:
        self.tallies.append(Tally(names[id(site)], site.location, site.num_experts, self.keep))
        return self.tallies[-1]

    def _tap_op(self, gm: fx.GraphModule, tally: Tally, node: fx.Node) -> None:
        if node.target is _OPS.moe.default:
            x, router = node.args[0], cast("list[fx.Node]", node.args[1])
            with gm.graph.inserting_after(node):
                tap = gm.graph.call_function(_tap_results(tally), (node, x, router[0]))
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


def _tap_results(tally: Tally) -> Callable[[Any, Tensor, Tensor], Any]:
    def tap(results: Any, x: Tensor, router: Tensor) -> Any:
        tally.add([results[3]])
        if x.shape[0]:
            tally.seen.append(seen_angles(x, router, results[3]))
        return results

    return tap


def _tap_ids(tally: Tally) -> Callable[..., Tensor]:
    def tap(*chosen: Tensor) -> Tensor:
        tally.add(chosen)
        return chosen[0]

    return tap


def record(
    target: Target, batches: Sequence[Batch], options: Options, choices: int = 0
) -> tuple[tuple[Load, ...], Report]:
    """Run the model once for each batch of (args, kwargs); loads by layer in execution order, and the report.

    choices: of how many tokens a layer's own choices are kept too. Experts run on this rank alone.
    """
    report = Report()
    alone = replace(options, rest="eager", experts_over="", placement="", ranks_per_node=0)
    recorder = Recorder(alone, report=report, keep=choices)
    torch._dynamo.reset()
    compiled = torch.compile(target.model, backend=recorder)
    with torch.no_grad():
        for args, kwargs in batches:
            with own_errors(target.model, args, kwargs):
                compiled(*args, **kwargs)
    return tuple(_merged(recorder.tallies, choices)), report


def _merged(tallies: Sequence[Tally], keep: int) -> list[Load]:
    """One load a layer; another shape of input is another graph of the same layer."""
    found: dict[tuple[str, str, int, int], list[Tally]] = {}
    for tally in tallies:
        if tally.batches:
            found.setdefault((tally.site, tally.location, tally.k, tally.experts), []).append(tally)
    return [
        Load(
            site,
            sum(tally.tokens for tally in same),
            k,
            experts,
            tuple(tuple(batch) for tally in same for batch in tally.batches),
            angles_of([seen for tally in same for seen in tally.seen]),
            tuple([chosen for tally in same for chosen in tally.choices][:keep]),
        )
        for (site, _, k, experts), same in found.items()
    ]
