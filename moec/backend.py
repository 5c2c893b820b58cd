"""torch.compile hands over a graph, each step is one line, a callable returns."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

import moec.runtime.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]  # defines the ops that graphs call
from moec.capture import install
from moec.capture.breaks import Mark
from moec.capture.buckets import ask_for_whole
from moec.capture.parts import compile_parts
from moec.capture.region import regions
from moec.capture.settle import no_loops_left, settle
from moec.capture.state import NotRolled
from moec.describe import Sorted, describe, layers_of, site_name, with_opaque, with_ranks
from moec.errors import ModelError
from moec.ir.graph import Graph, sweep
from moec.ir.text import dump
from moec.options import Environment, Options, check_mode
from moec.own_error import own_errors
from moec.passes import PASSES
from moec.passes.canonical.canonicalize import Canonicalize
from moec.passes.lowering.collector import no_collections
from moec.passes.lowering.kept_graph import KeptModule
from moec.passes.lowering.lower import groups_of, lower
from moec.passes.opaque.dispatch import find_opaque
from moec.passes.opaque.lower import sort_rows
from moec.passes.raising.autocast import outside_autocast, spell_casts, under_autocast
from moec.passes.raising.quick_look import can_hold_experts
from moec.passes.raising.raise_graph import Raised, fake
from moec.passes.raising.transforms import transformed, untransformed, updates_inside
from moec.passes.raising.vocabulary import raise_fx
from moec.passes.raising.words import key_of
from moec.pipeline import Facts, Miss, Observer, run_pipeline
from moec.proof import Verdict, prove, prove_bodies
from moec.report import GraphReport, PassRecord, Reason, Report
from moec.rest import Compiled, compile_rest
from moec.runtime.choose_once import choose_once
from moec.runtime.copies import copies_made
from moec.spread.lower import SITES, SPREAD, Spreading, spread
from moec.verify import recording, verifying

install.install()

TRANSFORMED = (
    "a transform of torch.func (grad, vmap, jvp) is inside what is compiled: what it runs is compiled without moec, "
    "and so is all of this graph where it updates tensors; compile the model itself for gradients by backward()"
)
NO_NODE = "its rows cannot be sorted: a value that this needs is overwritten before the loop"


@dataclass(frozen=True)
class Passed:
    """What the passes made of one graph, and what the proof says of each rewrite, by the value it replaces."""

    graph: Graph
    facts: Facts
    misses: list[Miss]
    records: list[PassRecord]
    verdicts: Mapping[str, Verdict]
    proof_seconds: float
    rewritten: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Backend:
    """moec with its options; `report` collects what happened, `trace` also keeps the graph after every pass."""

    options: Options = field(default_factory=Options)
    mode: str | None = None
    report: Report | None = None
    trace: bool = False

    __moec_backend__ = True

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        """Compile one captured graph."""
        ask_for_whole(can_hold_experts)
        not_rolled = settle(gm)
        start = time.perf_counter()
        parts = [self.rewrite(each, nested=each is not gm) for each in untransformed(gm)]
        no_loops_left(gm)
        if self.report is not None:
            self.report.seconds += time.perf_counter() - start - sum(part.proof_seconds for part in parts)
            self.report.graph_reports.append(_whole(parts))
            for loop in not_rolled:
                self.not_rolled(loop)
        return self.finish(gm, example_inputs)

    def not_rolled(self, loop: NotRolled) -> None:
        """Take note of a loop that stays as it was written; a compile that Dynamo gives up has no graph to say so."""
        reason = Reason(loop.reason, location=f"{loop.file}:{loop.line}")
        if self.report is not None and reason not in self.report.not_rolled:
            self.report.not_rolled.append(reason)

    def finish(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        """The rewritten graph as something to call."""
        if regions(gm):  # a rolled loop that nothing understood still runs, as the loop it was
            return compile_parts(gm, self.compile_rest)
        return self.compile_rest(gm, example_inputs)

    def facts(self, gm: fx.GraphModule, raised: Raised, nested: bool, hidden: str) -> Facts:
        """What passes may know of this graph."""
        return replace(facts_of(gm, raised, self._left(), nested), autocast=hidden)

    def rewrite(self, gm: fx.GraphModule, nested: bool = False) -> GraphReport:
        """Find the MoE layers of one graph and put kernels in their place; a bug in moec leaves the graph as it was."""
        if self.report is None and not can_hold_experts(gm.graph):  # a report also says what was looked at
            return GraphReport((), (), len(gm.graph.nodes))
        if updates_inside(gm):
            return GraphReport((), (), len(gm.graph.nodes), (TRANSFORMED,))
        before = KeptModule.of(gm)
        try:
            with no_collections():
                hidden = spell_casts(gm) if under_autocast(gm, nested) else ""
                with outside_autocast():
                    return self._rewrite(gm, nested, hidden)
        except Exception as error:  # whatever it is, the user's model still runs
            if self.options.experts_over:  # but not on this rank alone: the others would wait for its rows
                raise
            before.put_back()
            note = f"moec: internal error, this graph is compiled without moec: {type(error).__name__}: {error}"
            warnings.warn(note, RuntimeWarning, stacklevel=2)
            return GraphReport((), (), len(gm.graph.nodes), (note,))

    def _rewrite(self, gm: fx.GraphModule, nested: bool, hidden: str) -> GraphReport:
        start = time.perf_counter()
        raised = raise_fx(gm)
        graph = sweep(raised.graph)
        first = PassRecord("raise", 0, (time.perf_counter() - start) * 1e3, dump(graph)) if self.trace else None
        done = self._passes(gm, raised, graph, self.facts(gm, raised, nested, hidden))
        nodes = len(gm.graph.nodes)
        engine = self.options.engine(training=bool(done.facts.grad))
        lower(gm, raised, done.graph, str(engine), done.facts.grad, self.options.save_activations)
        if nested and done.facts.grad:
            choose_once(gm)
        # No real loop can run inside a higher-order operator; and fuel counts the rewrites of the passes.
        bodies = () if nested or self.options.fuel >= 0 else self._sort_bodies(gm)
        spreading = Spreading.of(self.options)
        over = spread(gm, spreading, layers_of(raised, done.graph)) if spreading else ()
        if self.report is None:
            return GraphReport((), (), nodes)
        groups = groups_of(raised, done.graph)
        proofs = {name: str(v) for root, v in done.verdicts.items() for i in groups[root] for name in i.results}
        said = describe(raised, done.graph, done.misses, done.facts, proofs)
        said = with_opaque(said, bodies, raised)
        said = with_ranks(said, over) if spreading else said
        records = (first, *done.records) if first is not None else ()
        unused = engine != self.options.engine(training=False) and said.sites
        notes = ("race, freeze and weights are for inference: this graph is trained",) if unused else ()
        notes += (TRANSFORMED,) if transformed(gm) else ()
        rewritten = self._said(raised, done)
        tried = {id(body.verdict): body.verdict for body in bodies if not body.verdict.remembered}
        seconds = done.proof_seconds + sum(verdict.seconds for verdict in tried.values())
        return GraphReport(said.sites, records, nodes, notes, seconds, said.regions, rewritten)

    def _left(self) -> Options:
        """The options with the fuel that the graphs so far have left: one budget for all that a report looks at."""
        if self.options.fuel < 0 or self.report is None:
            return self.options
        return replace(self.options, fuel=max(self.options.fuel - len(self.report.rewrites), 0))

    def _said(self, raised: Raised, done: Passed) -> tuple[str, ...]:
        """The rewrites for people: `find-experts: layers.3.mlp at model.py:12`."""
        made = done.graph.defs
        return tuple(
            f"{name}: {site_name(raised, value)}{f' at {made[value].loc}' if value in made and made[value].loc else ''}"
            for name, value in done.rewritten
        )

    def _passes(self, gm: fx.GraphModule, raised: Raised, graph: Graph, facts: Facts) -> Passed:
        """Run the passes; again without the rewrites that the proof refuses, until it refuses none."""
        seconds = 0.0
        while True:
            misses: list[Miss] = []
            records: list[PassRecord] = []
            observers: list[Observer] = [lambda step, misses=misses: misses.extend(step.outcome.misses)]
            rewritten: list[tuple[str, str]] = []
            observers.append(lambda s, into=rewritten: into.extend((s.name, v) for v in s.outcome.rewritten))
            observers += [recording(records)] if self.trace else []
            observers += [verifying()] if self.options.verify else []
            result = run_pipeline(PASSES, graph, facts, observers)
            start = time.perf_counter()
            verdicts = self._prove(gm, raised, result, facts)
            seconds += time.perf_counter() - start
            refused = {root: why for root, why in self._refused(verdicts).items() if root not in facts.refused}
            if not refused:
                return Passed(result, facts, misses, records, verdicts, seconds, tuple(rewritten))
            facts = replace(facts, refused={**facts.refused, **refused})

    def _prove(self, gm: fx.GraphModule, raised: Raised, graph: Graph, facts: Facts) -> Mapping[str, Verdict]:
        if self.options.proof == "off":
            return {root: Verdict("off") for root in groups_of(raised, graph)}
        return prove(gm, raised, graph, facts.grad, Environment.read().cache_dir / "proofs")

    def _sort_bodies(self, gm: fx.GraphModule) -> tuple[Sorted, ...]:
        """Dispatch and combine around the experts that are no MLPs, in what the passes left of a graph."""
        if not regions(gm):
            return ()
        raised = raise_fx(gm)
        found = find_opaque(Canonicalize().run(sweep(raised.graph), Facts()).graph)
        if self.options.proof == "off":
            verdicts = {site.root: Verdict("off") for site in found}
        else:
            grad = facts_of(gm, raised, self.options, nested=False).grad
            verdicts = prove_bodies(gm, raised, found, grad, Environment.read().cache_dir / "proofs")
        refused = self._refused(verdicts)
        done = sort_rows(gm, raised, tuple(site for site in found if site.root not in refused))
        left = {site: refused.get(site.root, NO_NODE) for site in found if site not in done}
        return tuple(Sorted(site, verdicts[site.root], left.get(site, "")) for site in found)

    def _refused(self, verdicts: Mapping[str, Verdict]) -> dict[str, str]:
        """The rewrites that are not to be used, and why; a wrong one is a bug in moec, and is said aloud."""
        refused: dict[str, str] = {}
        for root, verdict in verdicts.items():
            if verdict.status == "wrong":
                refused[root] = f"the rewrite was tried and computes something else: {verdict.reason}"
                note = f"moec: the layer at %{root} runs as it was written: {refused[root]}; please report it"
                warnings.warn(note, RuntimeWarning, stacklevel=2)
            elif verdict.status == "unproved" and self.options.proof == "strict":
                refused[root] = f"the rewrite could not be tried, and proof is 'strict': {verdict.reason}"
        return refused

    def compile_rest(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        """What is not MoE, by the compiler that the options name."""
        recorded = self.mode in ("reduce-overhead", "max-autotune")  # as CUDA graphs, which Inductor makes
        if nothing_to_compile(gm) and not recorded:
            return gm.forward
        return compile_rest(gm, example_inputs, self.options.rest, self.mode)


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """The backend that `torch.compile(model, backend="moec", options={…})` finds by its entry point.

    Raises OptionError for an unknown option, value or mode.
    """
    check_mode(mode)
    return Backend(Options.make(options), mode)(gm, example_inputs)


compile_graph.__moec_backend__ = True  # type: ignore[attr-defined]  # how capture knows moec's own compiles


def explain(
    model: Callable[..., Any], *args: Any, moec_options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Compile `model` for these inputs, run it once, and say what was found and done.

    `moec_options` are the options of `torch.compile(..., backend="moec", options=…)`.
    Raises OptionError, and ModelError where the model itself fails on these arguments, or cannot be called at all.
    """
    if not callable(model):
        raise ModelError(f"the model is {type(model).__name__}, which cannot be called; expected a module or function")
    return explain_call(model, args, kwargs, Options.make(moec_options))


def explain_call(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Options, symbolic: bool = False
) -> Report:
    """`explain` with its arguments as values; `symbolic`: sizes of inputs are symbols, other numbers are not."""
    report = Report()
    backend = Backend(options, report=report, trace=True)
    torch._dynamo.reset()
    mark = Mark.now()
    numbers = torch._dynamo.config.patch(specialize_float=True) if symbolic else contextlib.nullcontext()
    with own_errors(model, args, kwargs), numbers, copies_made() as copies:
        torch.compile(model, backend=backend, dynamic=True if symbolic else None)(*args, **kwargs)
    report.packed += copies
    report.graph_breaks += mark.breaks_since()
    if not report.complete:  # a loop that was traced as written and fused all the same needs no word
        for loop in install.declined_in(model):
            backend.not_rolled(loop)
    return report


def _whole(parts: Sequence[GraphReport]) -> GraphReport:
    """One report for a graph and the graphs inside it."""
    return GraphReport(
        tuple(site for part in parts for site in part.sites),
        tuple(record for part in parts for record in part.passes),
        sum(part.nodes for part in parts),
        tuple(note for part in parts for note in part.notes),
        sum(part.proof_seconds for part in parts),
        tuple(region for part in parts for region in part.regions),
        tuple(rewrite for part in parts for rewrite in part.rewrites),
    )


def facts_of(gm: fx.GraphModule, raised: Raised, options: Options, nested: bool) -> Facts:
    """What passes may know besides the graph. Inside a higher-order op Dynamo does not say what needs a gradient."""
    devices: dict[str, str] = {}
    not_plain: dict[str, str] = {}
    for node in gm.graph.nodes:
        value = fake(node)
        if node.op not in ("placeholder", "get_attr") or not isinstance(value, torch.Tensor):
            continue
        devices[node.name] = value.device.type
        if not _plain(value):
            not_plain[node.name] = type(value).__name__ if value.layout is torch.strided else str(value.layout)
    grad = _with_gradients(raised, nested) if torch.is_grad_enabled() else frozenset[str]()
    return Facts(options, grad, devices, not_plain)


_VIEWS = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "size", "getitem"})

_SITE_OPS = (*SITES, SPREAD)


def nothing_to_compile(gm: fx.GraphModule) -> bool:
    """Whether only moec's own ops and views are left: another compiler would add time and memory and win nothing."""
    calls = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
    sites = {n for n in calls if n.target in _SITE_OPS}
    # Nodes that lowering added carry no fake value; sizes are numbers.
    free = (type(None), int, torch.SymInt)
    return bool(sites) and all(n in sites or isinstance(fake(n), free) or key_of(n) in _VIEWS for n in calls)


def _with_gradients(raised: Raised, nested: bool) -> frozenset[str]:
    carriers = raised.carriers.items()
    return frozenset(name for name, holders in carriers if nested or any(_has_gradient(node) for node, _ in holders))


def _has_gradient(node: fx.Node) -> bool:
    value = fake(node)
    return isinstance(value, torch.Tensor) and value.requires_grad


def _plain(value: torch.Tensor) -> bool:
    kinds = (torch.Tensor, torch.nn.Parameter, torch._subclasses.FakeTensor)
    return type(value) in kinds and value.layout is torch.strided
