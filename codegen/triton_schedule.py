"""Which way a call's grouped products run: as the option `schedule` says, and the configurations worth trying.

pointers is the default: on an H100 no other way was faster (docs/kernels.md).

Letters: T tokens, H hidden, F expert width, E experts, k experts a token.
"""

from __future__ import annotations

import contextlib
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
    """The default, the same with one number changed, and the `tiles` tiles that prior and model rank first.

    All of them by pointers; default and first tile also in every other way that the target has. The model knows neither
    those nor what stages hide: a tile has as many as shared memory holds, since on an H100 fewer were always slower.
    """
    default = default_config(spec, sizes, target)
    if default.variant == "decode":
        return tuple(dict.fromkeys((default, *_around(default, ("block_n", "block_k", "num_warps")))))
    ranked = rank_with_prior(tuple(_tiles(spec, target)), sizes, uniform_histogram(sizes), target, spec.experts.dtype)
    best: dict[tuple[int, int, int], GpuConfig] = {}
    for config, _ in ranked:
        best.setdefault(tile_of(config), config)
    same = {"native_fp8": default.native_fp8, "group_m": default.group_m}
    first = [_deepest(replace(config, **same), spec, target) for config in list(best.values())[:tiles]]
    near = [c for c in _around(default, ("num_warps", "num_stages", "group_m")) if fits(c, target, spec.experts.dtype)]
    ways = [way for config in (default, *first[:1]) for way in _ways(config, spec, sizes, target)]
    return tuple(dict.fromkeys((default, *near, *first, *ways)))


def _around(config: GpuConfig, names: tuple[str, ...]) -> Iterator[GpuConfig]:
    """`config` with one of these numbers halved, or doubled; a number of stages is one less, or one more."""
    for name in names:
        value = int(getattr(config, name))
        for changed in (value - 1, value + 1) if name == "num_stages" else (value // 2, 2 * value):
            with contextlib.suppress(CodegenError):  # a number that no kernel takes
                yield replace(config, **{name: changed})


def _deepest(config: GpuConfig, spec: KernelSpec, target: GpuTarget) -> GpuConfig:
    """`config` with as many stages as fit; where operands are not copied ahead (AMD) its own."""
    if not target.name.startswith("sm_"):
        return config
    deeper = (replace(config, num_stages=stages) for stages in (4, 3))
    return next((c for c in deeper if fits(c, target, spec.experts.dtype)), config)


def _tiles(spec: KernelSpec, target: GpuTarget) -> Iterator[GpuConfig]:
    axes = ((16, 32, 64, 128), (64, 128, 256), (32, 64, 128), (1, 8), (4, 8), (2, 3, 4))
    for numbers in itertools.product(*axes):
        config = GpuConfig(*numbers)
        if fits(config, target, spec.experts.dtype):
            yield config


def _ways(config: GpuConfig, spec: KernelSpec, sizes: Sizes, target: GpuTarget) -> Iterator[GpuConfig]:
    """A tile by descriptors, persistent, specialised, as far as the target and the weights allow."""
    plain = contiguous(spec, sizes)
    for schedule in SCHEDULES[1:]:
        if schedule == "specialized" and config.block_m < 128:
            continue
        found = _named(config, schedule, target)
        described = found.weights == "descriptors"
        if _has(found, target) and not (described and undescribable(spec, sizes, found, plain)):
            yield found
