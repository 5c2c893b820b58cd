"""The process in which candidates run: a crash or a hang costs the candidate at hand and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from moec.children import start_child
from moec.codegen import twin
from moec.codegen.tuning import Tuning, default_tuning
from moec.ir.dtypes import DTYPES
from moec.ir.spec import KernelSpec
from moec.runtime.cpu import load_kernel
from moec.runtime.packed import load_packed
from moec.tune.gpu import GpuBench
from moec.tune.job import ROUTINGS, Job, routing, wrong_by
from moec.tune.operands import params_of

_SAMPLE = 0.004  # seconds of one measurement: short calls are repeated


class Bench:
    """One layer with random weights, ready to be timed."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self.spec, s = KernelSpec.parse(job.spec), job.sizes
        dtype = DTYPES[self.spec.experts.dtype]
        stored = job.weights == "stored"
        self.exact = stored or job.weights == "packed"
        self.kernel = load_kernel(job.spec, dtype) if stored else load_packed(job.spec, job.weights, dtype)
        torch.manual_seed(0)
        self.params = params_of(self.spec, s)
        self.x = torch.randn(s.T, s.H).to(dtype)
        self.weights = torch.full((s.T, s.k), 1.0 / s.k)
        self.default = default_tuning(self.spec, s, self.kernel.target, job.threads)
        self.routings = [routing(job, seed) for seed in range(ROUTINGS)]

    def measure(self, text: str) -> float:
        """Seconds a call."""
        kernel = self.kernel.tuned(Tuning.parse(text))
        kernel.experts(self.x, self.weights, self.routings[-1], self.params)
        taken: list[float] = []
        while sum(taken) < _SAMPLE or len(taken) < 2:
            start = time.perf_counter()
            kernel.experts(self.x, self.weights, self.routings[len(taken) % ROUTINGS], self.params)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def check(self, text: str) -> str:
        """What is wrong with the results (empty: nothing), against the twin; of a rounded copy, against the default."""
        kernel = self.kernel.tuned(Tuning.parse(text))
        got = kernel.experts(self.x, self.weights, self.routings[0], self.params)
        args = (self.x, self.weights, self.routings[0], self.params)
        want = twin.experts(*args, self.spec) if self.exact else self.kernel.tuned(self.default).experts(*args)
        return wrong_by(got, want, self.spec.experts.dtype)


def serve(pipe: Connection, job: Job) -> None:
    """Answer questions (word, text) by ("ok" | "failed", value) until the pipe closes."""
    _end_with_parent()
    bench: Bench | GpuBench | None = None
    while True:
        try:
            word, text = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            bench = bench or (GpuBench(job) if job.device else Bench(job))
            answer: Any = 0.0 if word == "start" else getattr(bench, word)(text)
            pipe.send(("ok", answer))
        except Exception as error:
            broken = isinstance(bench, GpuBench) and bench.broken()
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            pipe.send(("broken" if broken else "failed", text))


def _end_with_parent() -> None:
    """A candidate that hangs must not outlive a parent that was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Worker:
    """The parent's end: questions with a time limit; a process that crashed or hung is replaced by a new one."""

    def __init__(self, job: Job, serving: Callable[[Connection, Job], None] = serve, patience: float = 60.0) -> None:
        self._job, self._serving, self._patience = job, serving, patience
        self._process: Any = None
        self._pipe: Connection | None = None

    def ask(self, word: str, text: str = "") -> tuple[str, Any]:
        """("ok", answer) or ("failed", reason); starting the process is not part of the time limit."""
        if self._pipe is None:
            started = self._start()
            if started[0] != "ok" or word == "start":
                return started
        return self._question(word, text, self._patience)

    def _start(self) -> tuple[str, Any]:
        context = multiprocessing.get_context("spawn")
        pipe, child = context.Pipe()
        process = context.Process(target=self._serving, args=(child, self._job), daemon=True)
        start_child(process)
        child.close()
        self._pipe, self._process = pipe, process
        return self._question("start", "", 10 * self._patience)

    def _question(self, word: str, text: str, patience: float) -> tuple[str, Any]:
        assert self._pipe is not None
        try:
            self._pipe.send((word, text))
            if self._pipe.poll(patience):
                status, answer = self._pipe.recv()
                if status == "broken":  # the next candidate gets a process of its own
                    self.close()
                return ("ok", answer) if status == "ok" else ("failed", answer)
            reason = f"no answer within {patience:.0f} s"
        except (EOFError, OSError):
            self._process.join(1)
            reason = f"the process ended with code {self._process.exitcode}"
        self.close()
        return "failed", reason

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None
