"""Measuring one layer's Triton kernels on a GPU: launches are recorded once and replayed between two of its own events.

On a CPU the same goes through Triton's interpreter, which says nothing of speed and all of whether it works.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from moec.codegen import twin
from moec.codegen.encode import coded_spec
from moec.codegen.triton_config import GpuConfig
from moec.codegen.triton_schedule import candidates
from moec.errors import OptionError
from moec.gpu.target import gpu_target
from moec.ir.dtypes import DTYPES
from moec.ir.spec import KernelSpec
from moec.runtime.coded import coded_kernel
from moec.runtime.triton import load_triton, triton
from moec.runtime.tune_cache import Key, Made
from moec.runtime.tune_gpu_cache import gpu_key, gpu_made
from moec.target import GpuFigures, gpu_figures
from moec.tune.job import ROUTINGS, Job, routing, wrong_by
from moec.tune.operands import params_of

_SAMPLE = 0.004  # seconds that the calls of one measurement take together, or
_FEWEST, _MOST = 3, 40  # at least and at most so many calls
_COLD = 256 << 20  # bytes written before a call, or four times the L2 cache


class Clock(Protocol):
    """How long a call takes."""

    def seconds(self, call: Callable[[], object], before: Callable[[int], object]) -> float:
        """The median of a few calls; `before(i)` runs ahead of the i-th and is not measured."""
        ...


class EventClock:
    """The GPU's own clock. A call is recorded as a CUDA graph, so that the host's launches are not what is measured."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
        self._cold = torch.empty(max(_COLD, 4 * cache), dtype=torch.int8, device=device)

    def seconds(self, call: Callable[[], object], before: Callable[[int], object]) -> float:
        """The median of a few calls, each with a cold L2 cache."""
        with torch.cuda.device(self._device):
            return self._median(self._recorded(call), before)

    def unrecorded(self, call: Callable[[], object], before: Callable[[int], object]) -> float:
        """The same of calls that cannot be recorded, since they wait for the device; the host's launches count."""
        with torch.cuda.device(self._device):
            return self._median(call, before)

    def _median(self, call: Callable[[], object], before: Callable[[int], object]) -> float:
        first = self._calls(call, before, 1)
        count = int(min(max(_SAMPLE / max(first[0], 1e-7), _FEWEST), _MOST))
        return statistics.median(self._calls(call, before, count))

    def _calls(self, replay: Callable[[], object], before: Callable[[int], object], count: int) -> list[float]:
        pairs = [(self._event(), self._event()) for _ in range(count)]
        for i, (start, end) in enumerate(pairs):
            before(i)
            self._cold.zero_()
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    @staticmethod
    def _event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def _recorded(self, call: Callable[[], object]) -> Callable[[], object]:
        call()  # compiles, and keeps what outlives a call
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


class HostClock:
    """The host's clock, for the interpreter."""

    def seconds(self, call: Callable[[], object], before: Callable[[int], object]) -> float:
        """One call."""
        before(0)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def gpu_device(name: str) -> torch.device:
    """The device with its number; raises OptionError where Triton kernels do not run on it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    interpreted = device.type == "cpu" and triton().knobs.runtime.interpret
    if device.type != "cuda" and not interpreted:
        raise OptionError(f"--device {name!r}: expected a GPU: cuda, cuda:1, …")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"--device {name!r}: torch sees no GPU; --target sm_90 ranks and compiles without one")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def spec_of(job: Job) -> KernelSpec:
    """What is tuned: the layer's spec, over codes where the weights are kept as such."""
    spec = KernelSpec.parse(job.spec)
    return spec if job.weights == "stored" else coded_spec(spec, job.weights)


def gpu_texts(job: Job) -> tuple[str, ...]:
    """The configurations worth measuring, the default first. Raises OptionError for a GPU without known figures."""
    figures = _figures(job)
    target = gpu_target(figures.name if figures else "sm_90")
    if figures:
        target = replace(target, shared_bytes=figures.shared_bytes, processors=figures.processors)
    return tuple(map(str, candidates(spec_of(job), job.sizes, target)))


def key_of(job: Job) -> Key:
    """What the winner is kept under."""
    return gpu_key(spec_of(job), job.sizes, _figures(job))


def made_of(job: Job) -> Made:
    """Where and of what source it is measured."""
    return gpu_made(spec_of(job), _figures(job))


def _figures(job: Job) -> GpuFigures | None:
    device = torch.device(job.device)
    return gpu_figures(device) if device.type == "cuda" else None


class GpuBench:
    """One layer with random weights on a GPU, ready to be timed."""

    def __init__(self, job: Job, clock: Clock | None = None) -> None:
        self.device, s = torch.device(job.device), job.sizes
        self.spec = KernelSpec.parse(job.spec)
        self.clock = clock or (EventClock(self.device) if self.device.type == "cuda" else HostClock())
        dtype = DTYPES[self.spec.experts.dtype]
        with torch.device(self.device):
            torch.manual_seed(0)
            self.params = params_of(self.spec, s)
            self.x = torch.randn(s.T, s.H, dtype=dtype)
            self.weights = torch.full((s.T, s.k), 1.0 / s.k)
        self.routings = [routing(job, seed).to(self.device) for seed in range(ROUTINGS)]
        self.experts = self.routings[0].clone()
        plain = load_triton(str(self.spec), self.device)
        self.kernel = plain if job.weights == "stored" else coded_kernel(plain, job.weights, self.params)
        self.exact, self.default = job.weights == "stored", gpu_texts(job)[0]

    def measure(self, text: str) -> float:
        """Seconds a call."""
        return self.clock.seconds(lambda: self._call(text), self._route)

    def check(self, text: str) -> str:
        """What is wrong with the results (empty: nothing), against the twin; of a rounded copy, against the default."""
        self._route(0)
        got = self._call(text)
        args = (self.x, self.weights, self.experts, self.params)
        want = twin.experts(*args, self.spec) if self.exact else self._call(self.default)
        return wrong_by(got, want, self.spec.experts.dtype)

    def broken(self) -> bool:
        """Whether the device answers this process no more, as after an access outside of its memory."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False

    def _call(self, text: str) -> Tensor:
        kernel = self.kernel.with_config(GpuConfig.parse(text))
        return kernel.experts(self.x, self.weights, self.experts, self.params)

    def _route(self, turn: int) -> None:
        self.experts.copy_(self.routings[turn % ROUTINGS])
