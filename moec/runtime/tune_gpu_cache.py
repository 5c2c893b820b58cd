"""Configurations of Triton kernels that were measured: what they are kept under, and the one to use.

Letters: T tokens, H hidden, F expert width, E experts, k experts a token.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import version

from moec.codegen.plan import Sizes
from moec.codegen.triton_config import GpuConfig
from moec.codegen.triton_emit import emit
from moec.ir.spec import KernelSpec
from moec.runtime import tune_cache
from moec.runtime.tune_cache import INTERPRETER, Key, Made
from moec.target import GpuFigures


def gpu_key(spec: KernelSpec, sizes: Sizes, figures: GpuFigures | None) -> Key:
    """What a configuration for these sizes is kept under; no figures: the interpreter."""
    return Key.of(spec, sizes, 0, figures.name if figures else INTERPRETER)


@lru_cache(maxsize=256)
def gpu_made(spec: KernelSpec, figures: GpuFigures | None) -> Made:
    """The device, its compiler, and the source that `spec` becomes."""
    source = hashlib.sha256(emit(spec).encode()).hexdigest()[:16]
    return Made(figures.chip if figures else INTERPRETER, f"triton {version('triton')}", source)


def stored_config(spec: KernelSpec, sizes: Sizes, figures: GpuFigures | None) -> GpuConfig | None:
    """What was measured to be fastest for these sizes, or sizes near them."""
    entries = tune_cache.load()
    if not entries:
        return None
    found = tune_cache.nearest(gpu_key(spec, sizes, figures), gpu_made(spec, figures), entries)
    return found.config if found else None
