"""Find the rewrite that changes the answer: run the model with ever less fuel until two neighbours differ."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moec.backend import Backend
from moec.options import Options
from moec.own_error import own_errors
from moec.report import Report
from moec.tools.loading import Target
from moec.tools.proving import buffers_kept

TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}
"""Largest difference relative to the largest value: reassociated sums stay well below."""


@dataclass(frozen=True)
class Tried:
    """One run: with how many rewrites, and how far from eager (relative to what is allowed; above 1 is wrong)."""

    rewrites: int
    error: float

    @property
    def wrong(self) -> bool:
        """Whether the answer differs; what is no number does."""
        return not self.error <= 1


@dataclass(frozen=True)
class Verdict:
    """rewrites: all that were made, in order. culprit: the number of the first that changes the answer.

    culprit 0 means that the answer differs without any rewrite; None that it does not differ at all.
    """

    rewrites: tuple[str, ...]
    culprit: int | None
    tried: tuple[Tried, ...]

    @property
    def name(self) -> str:
        """The rewrite's own words; '' where there is none."""
        return self.rewrites[self.culprit - 1] if self.culprit else ""


def find_culprit(
    target: Target,
    options: Options,
    grad: bool = False,
    scale: float = 1.0,
    step: Callable[[Tried], None] = lambda tried: None,
) -> Verdict:
    """Bisect over fuel. `grad`: gradients count too. `scale` widens what is allowed."""
    with own_errors(target.model, target.args, target.kwargs):
        wanted = answer(target.model, target, grad)
    tried: list[Tried] = []

    def run(fuel: int) -> tuple[Tried, Report]:
        report = Report()
        backend = Backend(replace(options, fuel=fuel), report=report)
        torch._dynamo.reset()
        got = answer(torch.compile(target.model, backend=backend), target, grad)
        tried.append(Tried(len(report.rewrites), distance(got, wanted) / scale))
        step(tried[-1])
        return tried[-1], report

    whole, report = run(options.fuel)
    rewrites = tuple(report.rewrites)
    if not whole.wrong:
        return Verdict(rewrites, None, tuple(tried))
    if not rewrites or run(0)[0].wrong:
        return Verdict(rewrites, 0, tuple(tried))
    right, wrong = 0, len(rewrites)  # right with `right` rewrites, wrong with `wrong`
    while wrong - right > 1:
        middle = (right + wrong) // 2
        if run(middle)[0].wrong:
            wrong = middle
        else:
            right = middle
    return Verdict(rewrites, wrong, tuple(tried))


def answer(call: Callable[..., Any], target: Target, grad: bool) -> list[Tensor]:
    """Every tensor that the call gives, and with `grad` every gradient of the sum of their squares; seeded."""
    torch.manual_seed(0)
    args, kwargs = copy.deepcopy((target.args, dict(target.kwargs)))
    with torch.set_grad_enabled(grad), buffers_kept(target.model):
        out = [t for t in pytree.tree_leaves(call(*args, **kwargs)) if isinstance(t, Tensor)]
    if not grad:
        return out
    leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    if isinstance(target.model, torch.nn.Module):
        leaves += [p for p in target.model.parameters() if p.requires_grad]
    sums = [t.float().square().sum() for t in out if t.is_floating_point() and t.requires_grad]
    if not leaves or not sums:
        return out
    found = torch.autograd.grad(torch.stack(sums).sum(), leaves, allow_unused=True)
    return [*(t.detach() for t in out), *(torch.zeros(0) if g is None else g for g in _optional(found))]


def _optional(found: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Gradients of what is unused are None, whatever torch's annotation says."""
    return found


def distance(got: list[Tensor], wanted: list[Tensor]) -> float:
    """How far two answers are apart, in units of what is allowed; infinite where shapes or integers differ."""
    if len(got) != len(wanted):
        return float("inf")
    return max((_apart(a, b) for a, b in zip(got, wanted, strict=True)), default=0.0)


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if b.dtype not in TOLERANCE:
        return 0.0 if torch.equal(a, b) else float("inf")
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    if b.numel() == 0:
        return 0.0
    x, y = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (a, b))
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-30)) / TOLERANCE[b.dtype]
