"""Run both graphs of a rewrite on the same values, and say how far apart outputs and gradients are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from moec.capture.lower import lower_regions
from moec.proof.copying import Unprovable
from moec.proof.region import Half, Pair
from moec.proof.routings import WIDENED, Trial, values
from moec.proof.sizes import Sizes

TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.bfloat16: 4e-2,
    torch.float16: 5e-3,
}
"""The largest difference, relative to the largest value of the tensor, that rounding explains."""

_WIDE_METHODS = frozenset({"float", "half", "bfloat16"})


@dataclass(frozen=True)
class Difference:
    """How far one value of the replacement is from the original's: relative to the largest, and what is allowed."""

    what: str
    error: float
    allowed: float

    @property
    def wrong(self) -> bool:
        """Whether rounding does not explain it; NaN is wrong."""
        return not self.error <= self.allowed


def run_trial(pair: Pair, trial: Trial, sizes: Sizes, seed: int = 0, engine: str = "eager") -> list[Difference]:
    """The differences of all outputs, and of all gradients where there are any. Raises Unprovable."""
    leaves = values(pair, trial, sizes, seed)
    return differences(pair, leaves, sizes, trial.exact, engine)


def differences(
    pair: Pair, leaves: Mapping[str, Tensor], sizes: Sizes, exact: bool, engine: str = "eager"
) -> list[Difference]:
    """The same on given values of the leaves."""
    needs = [name for name, leaf in leaves.items() if name in pair.needs and leaf.is_floating_point()]
    with _as_if_outside():
        want = _run(pair.original, leaves, needs, sizes, exact, "")
        got = _run(pair.replacement, leaves, needs, sizes, exact, engine)
    names = [*pair.outputs, *(f"gradient of {name}" for name in needs)]
    return [_difference(name, g, w) for name, g, w in zip(names, got, want, strict=True)]


class _as_if_outside:
    """No autocast and no inference mode, whatever the user compiles under; gradients on."""

    def __enter__(self) -> None:
        self._modes = (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
        )
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)


def _run(
    half: Half, leaves: Mapping[str, Tensor], needs: list[str], sizes: Sizes, exact: bool, engine: str
) -> list[Tensor | None]:
    """The outputs, then the gradients by `needs` of a fixed random functional of them."""
    module = executable(half, sizes, exact, engine)
    fresh = {name: leaf.detach().clone().requires_grad_(name in needs) for name, leaf in leaves.items()}
    inputs = [fresh[half.feeds[n.name]] for n in module.graph.nodes if n.op == "placeholder"]
    inputs = [
        leaf.clone() if leaf.requires_grad else leaf for leaf in inputs
    ]  # an update in place of a leaf is an error
    try:
        outputs = list(module(*inputs))
        grads = _gradients(outputs, [fresh[name] for name in needs])
    except Exception as error:
        side = "matched code" if not engine else "replacement"
        raise Unprovable(f"the {side} fails on made-up values: {type(error).__name__}: {error}"[:300]) from error
    return [*outputs, *grads]


def _gradients(outputs: list[Tensor], by: list[Tensor]) -> list[Tensor | None]:
    if not by:
        return []
    generator = torch.Generator().manual_seed(1)
    total: Any = 0
    for y in outputs:
        if y.is_floating_point() and y.requires_grad:
            total = total + (y.double() * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
    if not isinstance(total, Tensor):
        return [None] * len(by)
    return list(torch.autograd.grad(total, by, allow_unused=True))


def executable(half: Half, sizes: Sizes, exact: bool, engine: str) -> fx.GraphModule:
    """The graph in these sizes and dtypes, rolled loops as loops; `engine` replaces that of moec's ops."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in half.graph.nodes:
        made = env[node] = graph.node_copy(node, env.__getitem__)
        args, kwargs = sizes.argument(made.args), sizes.argument(dict(made.kwargs))
        if exact:
            args, kwargs = map_aggregate((args, kwargs), _widened)
            if made.op == "call_method" and made.target in _WIDE_METHODS:
                made.target = "double"
        if engine and made.target in (torch.ops.moec.moe.default, torch.ops.moec.experts.default):
            args = (*args[:-1], engine)
        made.args, made.kwargs = args, kwargs
    return lower_regions(fx.GraphModule(nn.Module(), graph))


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in WIDENED else value


def _difference(what: str, got: Tensor | None, want: Tensor | None) -> Difference:
    if got is None or want is None:
        some = want if got is None else got
        zero = some is None or not bool(some.count_nonzero())  # no gradient and a gradient of zeros mean the same
        return Difference(what, 0.0 if zero else float("inf"), 0.0)
    if got.shape != want.shape or got.dtype != want.dtype:
        return Difference(f"{what}: {got.dtype}{list(got.shape)} for {want.dtype}{list(want.shape)}", float("inf"), 0.0)
    if not got.is_floating_point():
        return Difference(what, float((got != want).double().mean()) if got.numel() else 0.0, 0.0)
    return Difference(what, relative(got, want), TOLERANCE[want.dtype])


def relative(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest value; NaN must meet NaN."""
    if got.numel() == 0:
        return 0.0
    a, b = got.detach().double(), want.detach().double()
    if not torch.equal(a.isnan(), b.isnan()):
        return float("nan")
    a, b = a.nan_to_num(), b.nan_to_num()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if bool((a != b).any()) else 0.0
