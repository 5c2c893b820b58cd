"""Candidates of a GPU's kernels compiled ahead by several processes: measuring loads what Triton keeps on disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from multiprocessing import get_context

import torch

from moec.children import start_child
from moec.codegen.plan import Sizes
from moec.codegen.triton_config import GpuConfig
from moec.codegen.triton_emit import load
from moec.codegen.triton_launch import program
from moec.codegen.triton_operands import contiguous
from moec.kernels.jobs import tensor_bytes
from moec.runtime.compiled import Compiled
from moec.tune.gpu import spec_of
from moec.tune.job import Job

_PROCESSES = 16  # each has some memory of the GPU
_PATIENCE = 120.0  # seconds for all


def compile_ahead(
    job: Job,
    texts: Sequence[str],
    compile_some: Callable[[Job, Sequence[str]], None] | None = None,
    patience: float = _PATIENCE,
) -> None:
    """Compile these configurations, as many at once as there are cores.

    A configuration that crashes or hangs the compiler leaves those behind it to the measuring, which says so.
    """
    count = min(len(texts), os.cpu_count() or 1, _PROCESSES)
    if torch.device(job.device).type != "cuda" or count < 2:
        return
    context, until = get_context("spawn"), time.monotonic() + patience
    target = compile_some or compile_all
    started = [context.Process(target=target, args=(job, texts[i::count]), daemon=True) for i in range(count)]
    for process in started:
        start_child(process)
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
        process.kill()


def compile_all(job: Job, texts: Sequence[str]) -> None:
    """Compile what calls of `GpuBench` with these configurations launch; what the compiler refuses is left out."""
    spec, device = spec_of(job), torch.device(job.device)
    sizes = Sizes(**asdict(job.sizes))
    operands = replace(contiguous(spec, sizes), weights_dtype="f32")
    for text in texts:
        config = GpuConfig.parse(text)
        try:
            made = program(spec, sizes, config, operands, "experts")
            pairs = 8 * sizes.T * sizes.k
            given = {**tensor_bytes(spec, sizes), "weights": pairs // 2, "experts": pairs}
            reach = given | {buffer.name: buffer.bytes for buffer in made.buffers}
            Compiled(load(spec, tf32=config.tf32), made, device, reach)
        except Exception:  # measuring meets the same error, and keeps it as the candidate's
            continue
