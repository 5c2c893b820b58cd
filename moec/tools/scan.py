"""Say what would be fused in a file, package or module: on the meta device, with no weights and no data."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from moec.backend import Backend, Compiled
from moec.capture.breaks import Mark
from moec.errors import TargetError
from moec.ir.dtypes import GRAPH_DTYPES, GRAPH_NAMES
from moec.options import Options
from moec.own_error import brief
from moec.passes.raising.raise_graph import Raised, fake
from moec.pipeline import Facts
from moec.report import Report
from moec.tools.loading import Target
from moec.tools.scan_guess import Made, inputs_for, instances_of

UNKNOWN_SIZE = 2
"""Stands for a size that only data would say."""


@dataclass(frozen=True)
class Scanned:
    """One thing that was looked at: a module class or a factory.

    report  what would be done with it; None where it could not be looked at, `why` says for which reason
    inputs  what it was called with            holds  the scanned classes inside it that answer for it
    """

    name: str
    report: Report | None = None
    inputs: str = ""
    why: str = ""
    holds: tuple[str, ...] = ()


@dataclass(frozen=True)
class DryRun(Backend):
    """moec's backend for tensors without data: passes run as for a CPU, nothing is compiled, results have no data."""

    __moec_backend__ = True

    def facts(self, gm: fx.GraphModule, raised: Raised, nested: bool, hidden: str) -> Facts:
        """As on the CPU."""
        facts = super().facts(gm, raised, nested, hidden)
        return replace(facts, devices={n: "cpu" if d == "meta" else d for n, d in facts.devices.items()})

    def finish(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        """What the graph returns, as tensors without data."""
        output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
        return lambda *_: map_arg(output.args[0], lambda node: _empty(fake(node)))


def _empty(value: Any) -> Any:
    if isinstance(value, Tensor):
        sizes = [_number(n) for n in value.shape]
        return torch.empty(sizes, dtype=value.dtype, device="meta", requires_grad=value.requires_grad)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _number(value)
    return pytree.tree_map(_empty, value) if isinstance(value, (tuple, list)) else value


def _number(value: Any) -> Any:
    if isinstance(value, int):
        return value
    hint = value.node.hint if value.node.has_hint() else None
    return UNKNOWN_SIZE if hint is None else hint


def dry_run(target: Target, options: Options) -> Report:
    """What moec would do with a model for these inputs; whatever device they are on, no data is touched."""
    model = target.model.to("meta") if isinstance(target.model, nn.Module) else target.model
    args, kwargs = pytree.tree_map_only(Tensor, _meta, (target.args, dict(target.kwargs)))
    report = Report()
    backend = DryRun(replace(options, proof="off"), report=report, trace=True)
    torch._dynamo.reset()
    mark = Mark.now()
    torch.compile(model, backend=backend)(*args, **kwargs)
    report.graph_breaks += mark.breaks_since()
    return report


def _meta(t: Tensor) -> Tensor:
    return torch.empty_like(t, device="meta", requires_grad=t.requires_grad)


def scan_factory(name: str, make: Callable[[], Target], options: Options) -> Scanned:
    """A callable that gives a model and its inputs, called where every new tensor is without data."""
    with torch.device("meta"):
        target = make()
    return Scanned(name, dry_run(target, options), _shapes(target.args))


def scan_classes(
    classes: Sequence[type[nn.Module]],
    given: Mapping[str, Any],
    inputs: Sequence[Tensor],
    options: Options,
    step: Callable[[str], None] = lambda name: None,
) -> Iterable[Scanned]:
    """Every module class that can be made and called, inner ones first; one whose inner ones answer is not run."""
    made = sorted((instances_of(cls, given) for cls in classes), key=lambda m: m.size)
    answered: set[type] = set()
    for each in made:
        step(each.cls.__name__)
        inner = {type(m) for top in each.models[:1] for m in top.modules()} & (answered - {each.cls})
        if inner:
            yield Scanned(each.cls.__name__, holds=tuple(sorted(cls.__name__ for cls in inner)))
            continue
        found = _scan(each, inputs, options)
        if found.report is not None and found.report.sites:
            answered.add(each.cls)
        yield found


def _scan(made: Made, inputs: Sequence[Tensor], options: Options) -> Scanned:
    """The first instance and input that go together."""
    name, why = made.cls.__name__, made.why
    plain: Scanned | None = None
    for model in made.models:
        for args in [tuple(inputs)] if inputs else inputs_for(model):
            try:
                with _quiet():
                    report = dry_run(Target(model, args, {}), options)
            except Exception as error:
                why = why or brief(_cause(error))
                continue
            found = Scanned(name, report, _shapes(args))
            if report.sites:
                return found
            plain = plain or found
    return plain or Scanned(name, why=why or "no input was found that it takes; give one with --input")


def _cause(error: BaseException) -> BaseException:
    """What Dynamo was told: its own errors explain themselves first, and name the cause last."""
    inner = error.__cause__ or error.__context__
    return _cause(inner) if inner is not None and type(error).__module__.startswith("torch._dynamo") else error


@contextmanager
def _quiet() -> Generator[None]:
    """Without torch's own words about an input that does not fit: trying is how one is found."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _shapes(args: Any) -> str:
    tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
    return ", ".join(f"{GRAPH_NAMES.get(t.dtype, t.dtype)}[{', '.join(map(str, t.shape))}]" for t in tensors)


def parse_input(text: str) -> Tensor:
    """`f32[2, 7, 64]` → a tensor without data."""
    matched = re.fullmatch(r"\s*(\w+)\s*\[([\d,\s]*)\]\s*", text)
    if matched is None or matched[1] not in GRAPH_DTYPES:
        raise TargetError(f"--input {text!r} is not a tensor; for example --input 'f32[2, 7, 64]'")
    sizes = [int(n) for n in cast("str", matched[2]).split(",") if n.strip()]
    return torch.empty(sizes, dtype=GRAPH_DTYPES[matched[1]], device="meta")
