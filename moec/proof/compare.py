"""Run both graphs of a rewrite on the same values, and say how far apart outputs and gradients are."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from moec.capture.lower import lower_regions
from moec.passes.raising.raise_graph import fake
from moec.passes.raising.words import key_of
from moec.proof.copying import Fails, Unprovable
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

CPU = torch.device("cpu")

UNINITIALISED = frozenset({"empty", "empty_like", "new_empty"})
"""What gives memory as it is: both graphs get NaN there, which whatever they return must not depend on."""

_FACTORIES = frozenset({"zeros", "ones", "empty", "full", "eye", "linspace", "tensor", "rand", "randn"})
_WIDE_METHODS = frozenset({"float", "half", "bfloat16"})
_DEVICE_METHODS = frozenset({"cuda", "xpu", "cpu"})
_DEVICE = re.compile(r"(cpu|cuda|hip|xpu|mps)(:\d+)?")


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


@dataclass
class Runner:
    """Runs one rewrite as often as wanted; a graph is made executable once for each sizes and dtypes.

    Trials run on the CPU, wherever the model is: they are tiny, and must not disturb its device. A GPU's kernels are
    tried on that GPU.
    """

    pair: Pair
    engine: str = "eager"
    device: torch.device = CPU
    _made: dict[object, fx.GraphModule] = field(default_factory=dict[object, fx.GraphModule])

    def trial(self, trial: Trial, sizes: Sizes, seed: int = 0) -> list[Difference]:
        """The differences of outputs, and of gradients where they are tried and flow. Raises Unprovable."""
        return self.differences(values(self.pair, trial, sizes, seed), sizes, trial.exact, trial.gradients)

    def differences(
        self, leaves: Mapping[str, Tensor], sizes: Sizes, exact: bool, gradients: bool = True
    ) -> list[Difference]:
        """The same on given values of the leaves."""
        names = self.pair.needs if gradients else ()
        needs = [name for name, leaf in leaves.items() if name in names and leaf.is_floating_point()]
        with _as_if_outside():
            there = {name: leaf.detach().to(self.device) for name, leaf in leaves.items()}
            want = _run("matched code", self._executable(False, sizes, exact), self.pair.original, there, needs)
            got = _run("replacement", self._executable(True, sizes, exact), self.pair.replacement, there, needs)
        dtypes = {leaf.dtype for leaf in leaves.values()} | (set() if exact else _cast_to(self.pair.original.graph))
        allowed, count = max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes), len(self.pair.outputs)
        found = [_difference(*each, 1e-6, allowed) for each in zip(self.pair.outputs, got, want, strict=False)]
        # Gradients jump at the kinks of an activation, where rounding decides the side: few values may be far off.
        measure, floor = (_farthest if exact else _together), 1e-3 * _largest(want[count:])
        for name, g, w in zip(needs, got[count:], want[count:], strict=True):
            found.append(_difference(f"gradient of {name}", g, w, floor, allowed if exact else 5 * allowed, measure))
        return found

    def _executable(self, ours: bool, sizes: Sizes, exact: bool) -> fx.GraphModule:
        key = (ours, id(sizes), exact)
        if key not in self._made:
            half = self.pair.replacement if ours else self.pair.original
            self._made[key] = executable(half, sizes, exact, self.engine, self.device)
        return self._made[key]


@contextmanager
def _as_if_outside() -> Generator[None]:
    """Neither autocast nor inference mode, whatever the user compiles under; gradients on.

    One thread: the tensors are tiny, and waking others costs more than they save on a busy machine. The number of
    threads is the process's, as are torch's random numbers and what is printed to stderr while a graph runs (`_run`):
    other threads see it change for as long as a trial takes, and nothing of it outlives one that fails.
    """
    threads = torch.get_num_threads()
    modes: list[AbstractContextManager[Any]] = [
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ]
    if torch.get_default_device().type != "cpu":
        modes.append(torch.device("cpu"))
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        torch.set_num_threads(1)
        stack.callback(torch.set_num_threads, threads)
        yield


@contextmanager
def _same_random() -> Generator[None]:
    """The same random numbers for both graphs, and those of the user as they were."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _run(
    what: str, module: fx.GraphModule, half: Half, leaves: Mapping[str, Tensor], needs: list[str]
) -> list[Tensor | None]:
    """The outputs, then the gradients by `needs` of a fixed random functional of them."""
    fresh = {name: leaf.detach().clone().requires_grad_(name in needs) for name, leaf in leaves.items()}
    inputs = [fresh[half.feeds[n.name]] for n in module.graph.nodes if n.op == "placeholder"]
    inputs = [leaf.clone() for leaf in inputs]  # the code may update them in place
    try:
        with redirect_stderr(io.StringIO()), _same_random():  # a generated module prints its own code where it fails
            outputs = list(module(*inputs))
        grads = _gradients(outputs, [fresh[name] for name in needs])
    except Exception as error:
        text = f"the {what} fails on made-up values: {type(error).__name__}: {error}"
        kind = Fails if what == "replacement" else Unprovable
        raise kind(" ".join(text.split())[:300]) from error
    return [None if value is None else value.cpu() for value in (*outputs, *grads)]


def _gradients(outputs: list[Tensor], by: list[Tensor]) -> list[Tensor | None]:
    if not by:
        return []
    generator = torch.Generator("cpu").manual_seed(1)
    total: Any = 0
    for y in outputs:
        if y.is_floating_point() and y.requires_grad:
            share = torch.randn(y.shape, generator=generator, dtype=torch.float64, device="cpu")
            total = total + (y.double().cpu() * share).sum()
    if not isinstance(total, Tensor):
        return [None] * len(by)
    return list(torch.autograd.grad(total, by, allow_unused=True))


def executable(half: Half, sizes: Sizes, exact: bool, engine: str, device: torch.device) -> fx.GraphModule:
    """The graph in these sizes and dtypes on `device`, rolled loops as loops; `engine` replaces that of moec's ops."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in half.graph.nodes:
        made = env[node] = graph.node_copy(node, env.__getitem__)
        args, kwargs = sizes.argument(made.args), sizes.argument(dict(made.kwargs))
        args, kwargs = map_aggregate((args, kwargs), lambda value: _moved(value, device))
        if made.op == "call_method" and made.target in _DEVICE_METHODS:
            made.target, args, kwargs = "to", (args[0], device), {}
        if exact:
            args, kwargs = map_aggregate((args, kwargs), _widened)
            if key_of(node) in _FACTORIES and "dtype" not in kwargs and fake(node).dtype in WIDENED:
                kwargs = {**kwargs, "dtype": torch.float64}  # it would make numbers of torch's default dtype
            if made.op == "call_method" and made.target in _WIDE_METHODS:
                made.target = "double"
        if engine and made.target in (torch.ops.moec.moe.default, torch.ops.moec.experts.default):
            args = (*args[:-1], engine)
        made.args, made.kwargs = args, kwargs
        if key_of(node) in UNINITIALISED:
            env[node] = graph.call_function(_poisoned, (made,))
    return lower_regions(fx.GraphModule(nn.Module(), graph))


def _cast_to(graph: fx.Graph) -> set[torch.dtype]:
    """The dtypes that a graph names or has methods for: what it rounds to on the way."""
    found: set[torch.dtype] = set()
    for node in graph.nodes:
        if node.op == "call_method" and node.target in _WIDE_METHODS:
            found.add(getattr(torch, node.target))
        map_aggregate((node.args, node.kwargs), lambda arg: found.add(arg) if isinstance(arg, torch.dtype) else None)
    return found


def _poisoned(memory: Tensor) -> Tensor:
    return memory.fill_(torch.nan) if memory.is_floating_point() else memory


def _moved(value: Any, device: torch.device) -> Any:
    """`device` where an argument names a device."""
    if isinstance(value, str) and _DEVICE.fullmatch(value):
        return str(device) if ":" in value else device.type
    return device if isinstance(value, torch.device) else value


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in WIDENED else value


def _farthest(a: Tensor, b: Tensor, floor: float) -> float:
    """The largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=max(floor, 1e-30)))


def _together(a: Tensor, b: Tensor, floor: float) -> float:
    """The difference over the values, as vectors."""
    return float((a - b).norm() / b.norm().clamp(min=max(floor * b.numel() ** 0.5, 1e-30)))


def _difference(
    what: str,
    got: Tensor | None,
    want: Tensor | None,
    floor: float,
    allowed: float,
    measure: Callable[[Tensor, Tensor, float], float] = _farthest,
) -> Difference:
    if got is None or want is None:
        some = want if got is None else got
        zero = some is None or not bool(some.count_nonzero())  # no gradient and a gradient of zeros mean the same
        return Difference(what, 0.0 if zero else float("inf"), 0.0)
    if got.shape != want.shape or got.dtype != want.dtype:
        return Difference(f"{what}: {got.dtype}{list(got.shape)} for {want.dtype}{list(want.shape)}", float("inf"), 0.0)
    if got.numel() == 0:
        return Difference(what, 0.0, allowed)
    if not got.is_floating_point():
        return Difference(what, float((got != want).double().mean()), 0.0)
    a, b = got.detach().double(), want.detach().double()
    error = measure(a.nan_to_num(), b.nan_to_num(), floor) if torch.equal(a.isnan(), b.isnan()) else float("nan")
    return Difference(what, error, max(allowed, TOLERANCE[want.dtype]))


def _largest(values: Sequence[Tensor | None]) -> float:
    """The largest finite gradient: one that is nothing beside it may be pure rounding, that of w / w for instance."""
    finite = (v.nan_to_num(0.0, 0.0, 0.0) for v in values if v is not None and v.numel())
    return max((float(v.abs().max()) for v in finite), default=0.0)
