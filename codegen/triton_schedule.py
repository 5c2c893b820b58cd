"""Which way a call's grouped products run: as the option `schedule` says, and the configurations worth trying.

pointers is the default: on an H100 no other way was faster (docs/kernels.md).

Letters: T tokens, H hidden, F expert width, E experts, k experts a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from moec.codegen.cost_model import fits, tile_of, uniform_histogram
from moec.codegen.plan import Sizes
from moec.codegen.tile_prior import rank_with_prior
from moec.codegen.triton_config import GpuConfig, GpuFigures, check_target, default_config
from moec.codegen.triton_operands import contiguous
from moec.codegen.triton_views import undescribable
from moec.errors import CodegenError
from moec.gpu.target import GpuTarget
from moec.ir.engine import SCHEDULES
from moec.ir.spec import KernelSpec

_PROGRAMS = 128  # of the interpreter


def scheduled(config: GpuConfig, schedule: str, target: GpuFigures | None) -> GpuConfig:
    """`config` run the way that `schedule` names; a decode configuration has one way only and stays as it is.

    Raises CodegenError where a way is not there on the target.
    """
    if config.variant == "decode" or schedule == "pointers":
        return config
    if schedule == "specialized" and config.combine == "atomic":
        raise CodegenError("schedule='specialized' adds slots in a launch of its own; use combine='ordered'")
    return check_target(_named(config, schedule, target), target)


def _named(config: GpuConfig, schedule: str, target: GpuFigures | None) -> GpuConfig:
    programs = target.processors if target else _PROGRAMS
    if schedule == "persistent":
        return replace(config, programs=programs)
    if schedule == "descriptors":
        return replace(config, weights="descriptors")
    changed = {"weights": "descriptors", "programs": programs, "specialized": True, "combine": "separate"}
    return replace(config, block_m=max(128, config.block_m), num_warps=4, **changed)


def _has(config: GpuConfig, target: GpuFigures | None) -> bool:
    try:
        check_target(config, target)
    except CodegenError:
        return False
    return True


@lru_cache(maxsize=64)
def candidates(spec: KernelSpec, sizes: Sizes, target: GpuTarget, tiles: int = 6) -> tuple[GpuConfig, ...]:
    """The default, then the `tiles` tiles that prior and model rank first, each in every way that the target has.

    The model does not tell the ways of one tile apart: they follow one another, pointers first.
    """
    default = default_config(spec, sizes, target)
    if default.variant == "decode":
        return (default,)
    ranked = rank_with_prior(tuple(_tiles(spec, target)), sizes, uniform_histogram(sizes), target, spec.experts.dtype)
    best: dict[tuple[int, int, int], GpuConfig] = {}
    for config, _ in ranked:
        best.setdefault(tile_of(config), config)
    found = dict.fromkeys([default])
    for config in (default, *list(best.values())[:tiles]):
        found |= dict.fromkeys(_ways(replace(config, native_fp8=default.native_fp8), spec, sizes, target))
    return tuple(found)


def _tiles(spec: KernelSpec, target: GpuTarget) -> Iterator[GpuConfig]:
    axes = ((16, 32, 64, 128), (64, 128, 256), (32, 64, 128), (1, 8), (4, 8), (2, 3, 4))
    for numbers in itertools.product(*axes):
        config = GpuConfig(*numbers)
        if fits(config, target, spec.experts.dtype):
            yield config


def _ways(config: GpuConfig, spec: KernelSpec, sizes: Sizes, target: GpuTarget) -> Iterator[GpuConfig]:
    """One tile by pointers, by descriptors, persistent, specialised, as far as the target and the weights allow."""
    yield config
    plain = contiguous(spec, sizes)
    for schedule in SCHEDULES[1:]:
        if schedule == "specialized" and config.block_m < 128:
            continue
        found = _named(config, schedule, target)
        described = found.weights == "descriptors"
        if _has(found, target) and not (described and undescribable(spec, sizes, found, plain)):
            yield found
