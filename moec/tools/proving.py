"""`moec verify`: the long proof of every rewrite of a user's model, and the whole model against eager."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from moec.backend import Backend
from moec.describe import site_name
from moec.ir.graph import Graph
from moec.options import Options
from moec.own_error import own_errors
from moec.passes.raising.raise_graph import Raised
from moec.pipeline import Facts
from moec.proof import Verdict
from moec.proof.compare import TOLERANCE
from moec.proof.copying import Unprovable
from moec.proof.long import Examined, examine
from moec.proof.region import Carver
from moec.report import Report, Site

WHOLE_MODEL = 10.0
"""How much more than one layer a whole model may differ: errors of layers add up."""


@dataclass(frozen=True)
class Checked:
    """One rewrite: its layer, what was tried, and why it could not be tried."""

    name: str
    seen: Examined | None
    reason: str = ""

    @property
    def status(self) -> str:
        """agrees | differs | unproved"""
        if self.seen is None or not self.seen.trials:
            return "unproved"
        return "differs" if self.seen.wrong else "agrees"


@dataclass(frozen=True)
class Whole:
    """The compiled model against eager on the user's inputs: relative distances as vectors; None: no gradient flows."""

    outputs: float
    gradients: float | None
    allowed: float

    @property
    def equal(self) -> bool:
        """Whether rounding explains the distances."""
        return self.outputs <= self.allowed and (self.gradients is None or self.gradients <= 2 * self.allowed)


@dataclass(frozen=True)
class Verification:
    """Everything that `moec verify` found out."""

    rewrites: tuple[Checked, ...]
    declined: tuple[Site, ...]
    whole: Whole

    @property
    def holds(self) -> bool:
        """At least one rewrite, all of them agree, and so does the model."""
        return bool(self.rewrites) and all(c.status == "agrees" for c in self.rewrites) and self.whole.equal

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "holds": self.holds,
            "rewrites": [{**asdict(c), "status": c.status} for c in self.rewrites],
            "declined": [asdict(site) for site in self.declined],
            "whole": {**asdict(self.whole), "equal": self.whole.equal},
        }


@dataclass(frozen=True)
class Examining(Backend):
    """moec, each distinct rewrite examined while it is compiled; `found` grows. Layers alike are examined once."""

    found: list[Checked] = field(default_factory=list[Checked])
    step: Callable[[str], None] = print

    def _prove(self, gm: fx.GraphModule, raised: Raised, graph: Graph, facts: Facts) -> Mapping[str, Verdict]:
        verdicts = super()._prove(gm, raised, graph, facts)
        carver = Carver(gm, raised, graph, facts.grad)
        for root in carver.groups:
            name = site_name(raised, root)
            self.step(name)
            try:
                self.found.append(Checked(name, examine(carver.pair(root), self.options.kernels)))
            except Unprovable as error:
                self.found.append(Checked(name, None, str(error)))
        return verdicts


def verify_model(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
    step: Callable[[str], None],
) -> Verification:
    """Examine every rewrite of `model` for these inputs, gradients too where grad mode is on; it is left as it was."""
    report, found = Report(), list[Checked]()
    backend = Examining(Options.make({"rest": "eager", **options}), report=report, found=found, step=step)
    torch._dynamo.reset()
    with own_errors(model, args, kwargs), buffers_kept(model):
        want = _run(model, model, args, kwargs)
    with buffers_kept(model):
        got = _run(torch.compile(model, backend=backend), model, args, kwargs)
    unique = {c.name: c for c in found}  # a graph whose proof refused a rewrite is gone through again
    declined = tuple(site for site in report.sites if site.status != "fused")
    return Verification(tuple(unique.values()), declined, _compared(got, want))


@contextmanager
def buffers_kept(model: Callable[..., Any]) -> Generator[None]:
    """A model's buffers are afterwards as they were: what one run counts must not change the answer of the next."""
    held = list(model.buffers()) if isinstance(model, nn.Module) else []
    before = [buffer.detach().clone() for buffer in held]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(held, before, strict=True):
                buffer.copy_(value)


def _run(
    run: Callable[..., Any], model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Floating outputs; and the gradients of a fixed functional of them by the parameters that have one."""
    torch.manual_seed(0)
    outputs = [y for y in tree_leaves(run(*args, **kwargs)) if isinstance(y, Tensor) and y.is_floating_point()]
    if not (torch.is_grad_enabled() and isinstance(model, nn.Module) and any(y.requires_grad for y in outputs)):
        return [y.detach() for y in outputs], []
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for y in (y for y in outputs if y.requires_grad):
        total = total + (y.double().cpu() * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
    by = [p for p in model.parameters() if p.requires_grad]
    return [y.detach() for y in outputs], list(torch.autograd.grad(total, by, materialize_grads=True))


def _compared(got: tuple[list[Tensor], list[Tensor]], want: tuple[list[Tensor], list[Tensor]]) -> Whole:
    dtypes = [t.dtype for t in (*want[0], *want[1])]
    allowed = WHOLE_MODEL * max((TOLERANCE.get(d, 0.0) for d in dtypes), default=0.0)
    return Whole(_distance(got[0], want[0]), _distance(got[1], want[1]) if want[1] else None, min(allowed, 0.2))


def _distance(got: list[Tensor], want: list[Tensor]) -> float:
    """‖got − want‖ / ‖want‖ over all tensors; infinite where shapes or the places of NaN differ."""
    if [t.shape for t in got] != [t.shape for t in want]:
        return float("inf")
    if not all(torch.equal(g.isnan(), w.isnan()) for g, w in zip(got, want, strict=True)):
        return float("inf")
    off = sum(float((g.double() - w.double()).nan_to_num().norm()) ** 2 for g, w in zip(got, want, strict=True))
    size = sum(float(w.double().nan_to_num().norm()) ** 2 for w in want)
    return (off**0.5) / max(size**0.5, 1e-30)
