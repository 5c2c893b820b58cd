"""What `moec kernels` is asked for → jobs for the offline compiler: spec, sizes, target and configuration as values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from moec.codegen import triton_emit
from moec.codegen.plan import Sizes
from moec.codegen.triton_config import GpuConfig, check_target, default_config
from moec.codegen.triton_launch import Launch, program
from moec.errors import CodegenError, OptionError, ParseError
from moec.gpu.offline import Job, Pointer
from moec.gpu.target import GpuTarget, gpu_target
from moec.ir.dtypes import DTYPES, STORED
from moec.ir.spec import ExpertsSpec, KernelSpec

_SMALL = 1 << 20  # bytes of tensors whose size never matters: biases, routing weights


@dataclass(frozen=True)
class Request:
    """Kernels of one MoE layer on one target. `config` holds what differs from the target's default configuration."""

    spec: KernelSpec
    sizes: Sizes
    target: GpuTarget
    config: tuple[tuple[str, Any], ...] = ()

    @property
    def full_config(self) -> GpuConfig:
        """The default configuration for spec, sizes and target with the changes that were asked for."""
        default = default_config(self.spec, self.sizes, self.target, bool(dict(self.config).get("tf32")))
        try:
            return check_target(replace(default, **dict(self.config)), self.target)
        except CodegenError as error:
            raise OptionError(f"--config: {error}") from error

    def varied(self, text: str) -> Request:
        """This request with what `text` says instead: a spec, or a target and config values separated by commas."""
        if " -> " in text:
            return replace(self, spec=parse_spec(text))
        parts = [part.strip() for part in text.split(",") if part.strip()]
        changes = parse_config([part for part in parts if "=" in part])
        targets = [part for part in parts if "=" not in part]
        if not parts or len(targets) > 1:
            raise OptionError(f"--diff {text!r}: expected a spec, or a target and config values: sm_90,num_stages=4")
        target = gpu_target(targets[0]) if targets else self.target
        return replace(self, target=target, config=tuple((dict(self.config) | dict(changes)).items()))


@dataclass(frozen=True)
class KernelJob:
    """One launch of a layer's call and the job that compiles its kernel."""

    launch: Launch
    job: Job


def kernel_jobs(request: Request) -> tuple[KernelJob, ...]:
    """The launches of one call, in order. Raises OptionError for a spec or sizes without kernels."""
    try:
        config = request.full_config
        source = triton_emit.emit(request.spec, config.tf32)
        plan = program(request.spec, request.sizes, config)
    except CodegenError as error:
        raise OptionError(f"no GPU kernels: {error}") from error
    extents = tensor_bytes(request.spec, request.sizes)
    for buffer in plan.buffers:
        extents[buffer.name] = buffer.bytes
    return tuple(KernelJob(launch, launch_job(source, launch, extents)) for launch in plan.launches)


def launch_job(source: str, launch: Launch, extents: Mapping[str, int]) -> Job:
    """The job that compiles a launch's kernel; `extents`: bytes behind its pointers, by name."""
    arguments = {
        a.name: Pointer(a.type[1:], extents.get(a.name, _SMALL)) if a.type.startswith("*") else a.value
        for a in launch.arguments
    }
    return Job(source, launch.kernel, arguments, launch.num_warps, launch.num_stages)


def tensor_bytes(spec: KernelSpec, sizes: Sizes) -> dict[str, int]:
    """Bytes of the call's tensors by name, as far as a compiler's choices depend on them."""
    e, s = spec.experts, sizes
    each = DTYPES[e.dtype].itemsize
    extents = {"x": s.T * s.H * each, "router": s.E * s.H * each, "y": s.T * s.O * DTYPES[spec.y_dtype].itemsize}
    return extents | {group: _group_bytes(e, group, s) for group in e.param_groups}


def _group_bytes(e: ExpertsSpec, group: str, sizes: Sizes) -> int:
    if not e.stacked:
        return 8 * sizes.E  # a table of pointers
    return sizes.E * math.prod(e.shape(group, sizes.H, sizes.F, sizes.O)) * STORED[e.stored(group)].itemsize


def parse_spec(text: str) -> KernelSpec:
    """A spec from the command line; OptionError in one line where it does not parse."""
    try:
        return KernelSpec.parse(text.strip())
    except ParseError as error:
        raise OptionError(str(error)) from error


def parse_config(pairs: Sequence[str]) -> tuple[tuple[str, Any], ...]:
    """`block_m=64,num_stages=4` → changes of a GpuConfig; OptionError names the nearest field."""
    kinds = {f.name: {"int": int, "bool": bool}.get(str(f.type), str) for f in fields(GpuConfig)}
    changes: list[tuple[str, Any]] = []
    for pair in (part.strip() for text in pairs for part in text.split(",") if part.strip()):
        name, _, value = pair.partition("=")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise OptionError(f"--config {pair!r}: unknown field{hint}; fields: {', '.join(kinds)}")
        changes.append((name, _value(pair, value, kinds[name])))
    return tuple(changes)


def _value(pair: str, text: str, kind: type) -> Any:
    if kind is bool:
        words = {"true": True, "false": False, "1": True, "0": False}
        if text.lower() in words:
            return words[text.lower()]
        raise OptionError(f"--config {pair!r}: expected true or false")
    try:
        return kind(text)
    except ValueError:
        raise OptionError(f"--config {pair!r}: expected a number") from None
