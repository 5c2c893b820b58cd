"""KernelSpec → Triton: a readable Python module of kernels for one spec, kept on disk and loaded from there.

The kernels are templates beside this file (`*.triton.j2`): what the spec decides is decided in the text, sizes and
tiles are `tl.constexpr` arguments (see `moec.codegen.triton_launch`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2

from moec.codegen import triton_views
from moec.codegen.cpp import check
from moec.codegen.triton_codes import TYPES, base, coded_context
from moec.codegen.triton_phi import function, functions, number, used
from moec.errors import BuildError, CodegenError
from moec.files import write_whole
from moec.ir.expr import Var, call, derivative
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.options import Environment

_HEAD = '''"""{spec}

Generated. Letters: T tokens, H hidden, F expert width, E experts, K experts a token; a pair is one (token, slot).
"""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))  # where bfloat16 is multiplied and rounded wrongly
LEAST = tl.constexpr(-(2**31))  # a key below every value
TILES = tl.constexpr(0)  # counters: row tiles in use, units of work taken, tiles done, rows,
QUEUE = tl.constexpr(1)
DONE = tl.constexpr(2)
ROWS = tl.constexpr(3)
TAKEN = tl.constexpr(4)  # units of routing taken, and of choices done
CHOSEN = tl.constexpr(5)
WRITTEN = tl.constexpr(6)  # read by none


@triton.jit
def to_bf16(value):
    """To bfloat16, to the nearest and even; the interpreter's own conversion cuts digits off."""
    if value.dtype == tl.bfloat16:
        return value
    if INTERPRET:
        value = value.to(tl.float32)
        bits = value.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, near.to(tl.float32, bitcast=True), value)
    return value.to(tl.bfloat16)
'''


@lru_cache(maxsize=1024)
def emit(spec: KernelSpec, tf32: bool = False) -> str:
    """The Triton module of `spec`; `tf32` as in GpuConfig. Raises CodegenError for a spec that has no kernel."""
    check(spec)
    e, r = spec.experts, spec.router
    phi = e.phi
    gated = e.ab_views == 2
    needed = used([phi, *((r.scored, r.softened) if r else ())])
    parts = [
        _HEAD.format(spec=textwrap.fill(f"moec: {spec}", 110)),
        functions(dict.fromkeys(needed)),
        function("phi", ("a", "b") if gated else ("a",), {"h": phi}, "The activation."),
        *(_score_functions(r) if r else ()),
    ]
    return _joined(spec, parts, (*(("router",) if r else ()), "dispatch", "tiles", "experts", "decode"), tf32)


def _score_functions(r: RouterSpec) -> list[str]:
    """What the scores are made with, beside the softmax."""
    given = "softmax" if r.softmax else "logits"
    made = (
        [] if r.scored == Var(given) else [function("score_of", (given,), {"score": r.scored}, "The score function.")]
    )
    if r.softmax and r.softened != Var("logits"):
        made.append(function("softmax_of", ("logits",), {"value": r.softened}, "What the softmax is taken of."))
    return made


@lru_cache(maxsize=1024)
def emit_backward(spec: KernelSpec, tf32: bool = False) -> str:
    """The Triton module of the experts' gradients; `tf32` as in GpuConfig.

    Raises CodegenError for a spec that has no kernel.
    """
    check(spec)
    e = spec.experts
    if e.codes:
        raise CodegenError(f"there are no gradients of experts kept as {e.codes}; use weights='stored'")
    inputs = ("a", "b")[: e.ab_views]
    slopes = {"h": e.phi, **{f"d{name}": call("mul", Var("dh"), derivative(e.phi, name)) for name in inputs}}
    parts = [
        _HEAD.format(spec=textwrap.fill(f"moec, gradients: {spec}", 110)),
        functions(dict.fromkeys(used(slopes.values()))),
        function("slopes", (*inputs, "dh"), slopes, "The activation, and the gradients by its inputs."),
    ]
    return _joined(spec, parts, ("dispatch", "tiles", "backward"), tf32)


def _joined(spec: KernelSpec, parts: Sequence[str], templates: Sequence[str], tf32: bool) -> str:
    context = {**_context(spec), "precision": "tf32" if tf32 else "ieee"}
    texts = (*parts, *(_template(name).render(context) for name in templates))
    return "\n\n".join(part.strip("\n") + "\n" for part in texts if part.strip())


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).resolve().parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(f"{name}.triton.j2")


def _context(spec: KernelSpec) -> dict[str, Any]:
    """What the templates read."""
    s, r = spec.experts, spec.router
    first = [g for g in s.param_groups if not g.endswith("out")]
    return {
        "s": s,
        "r": r,
        "types": TYPES,
        "dtype": TYPES[s.dtype],
        "number": number,
        "cast": _cast,
        "rounded": _rounded,
        "y_dtype": spec.y_dtype,
        "aligned": 16,
        "on_input": s.weight_on == "input",
        "first": first,
        "last": [g for g in s.param_groups if g.endswith("out")],
        "matrices": [g for g in first if not g.startswith(("bias_", "scale_"))],
        "projections": _rows(s, "f_in", ""),
        "biases": _rows(s, "f_in", "bias_") if s.bias_in else [],
        "projected": s.ab_views,
        "make_view": lambda group: triton_views.make(s, group),
        "read_view": lambda group: triton_views.read(s, group),
        "base": lambda group: base(s, group, s.stored(group)),
        "own_base": lambda name: base(s, name, s.stored("bias_out") if "bias" in name else s.dtype),
        "bias_dtype": s.stored("bias_out"),
        **coded_context(s),
        "slopes": [f"d{name}" for name in ("a", "b")[: s.ab_views]],
        "strides": _strides,
        "stride_names": _stride_names,
        **(_router_context(r) if r else {}),
    }


def _router_context(r: RouterSpec) -> dict[str, Any]:
    choice = r.compute if r.choose_by == "logits" else r.score_dtype
    return {
        "choice_dtype": choice,
        "weight_from_dtype": choice if r.weight_from == "choice" else r.score_dtype,
        # The value that was chosen by is what the weight is made of: no second look for it is needed.
        "weight_is_key": r.weight_from == "choice"
        or (r.choose_by != "logits" and not r.selection_bias and r.groups == 1),
        "maps_logits": r.softened != Var("logits"),
        "maps_score": r.score not in ("softmax", "logits"),
        "block_groups": 1 << max(r.groups - 1, 0).bit_length(),
    }


def _rows(s: ExpertsSpec, f: str, prefix: str) -> list[tuple[str, str, str]]:
    """(variable of φ, parameter group, its row for column f of h) of each projection, or of its bias."""
    if s.gate == "separate":
        return [("a", f"{prefix}a", f), ("b", f"{prefix}b", f)]
    group = f"{prefix}ab"
    if s.gate == "concat":
        return [("a", group, f), ("b", group, f"({f} + F)")]
    if s.gate == "interleaved":
        return [("a", group, f"(2 * {f})"), ("b", group, f"(2 * {f} + 1)")]
    return [("a", group, f)]


def _axes(group: str) -> tuple[str, ...]:
    return ("e", "n") if group.startswith("bias_") else ("e", "n", "k")


def _cast(text: str, dtype: str) -> str:
    """`text` converted to `dtype`."""
    if dtype == "bf16":
        return f"to_bf16({text})"
    return f"{text if text.isidentifier() else f'({text})'}.to({TYPES[dtype]})"


def _rounded(text: str, dtype: str) -> str:
    """`text` as float32, rounded to what `dtype` can hold."""
    return _cast(text, dtype) if dtype == "f32" else f"{_cast(text, dtype)}.to(tl.float32)"


def _strides(groups: Sequence[str]) -> str:
    """The strides of parameter groups as constexpr arguments, a group a line."""
    lines = (" ".join(f"stride_{g}_{axis}: tl.constexpr," for axis in _axes(g)) for g in groups)
    return "\n    ".join(lines)


def _stride_names(groups: Sequence[str], indent: int) -> str:
    lines = (" ".join(f"stride_{g}_{axis}," for axis in _axes(g)) for g in groups)
    return ("\n" + " " * indent).join(lines)


def load(spec: KernelSpec, backward: bool = False, tf32: bool = False) -> ModuleType:
    """The Triton module of `spec` (or of its gradients), imported from a file that tools and people can read.

    Raises CodegenError for a spec without kernels, BuildError where the file cannot be written.
    """
    from triton import knobs

    return _load((emit_backward if backward else emit)(spec, tf32), bool(knobs.runtime.interpret))


@lru_cache(maxsize=1024)
def _load(source: str, interpreted: bool) -> ModuleType:
    """Kernels are decorated as the module is imported: for the interpreter or for a GPU, hence the key."""
    key = hashlib.sha256(source.encode()).hexdigest()[:32]
    path = _written(Environment.read().cache_dir / "triton" / f"moec_{key}.py", source)
    found = importlib.util.spec_from_file_location(f"moec_triton_{key}_{int(interpreted)}", path)
    if found is None or found.loader is None:
        raise BuildError(f"{path} cannot be imported as a Python module")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _written(path: Path, source: str) -> Path:
    """`path` with `source` in it; what is there already is kept where it is the same."""
    try:
        if path.exists() and path.read_bytes() == source.encode():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, source)
    except OSError as error:
        raise BuildError(f"the Triton module {path} cannot be written: {error}; set MOEC_CACHE_DIR") from error
    return path
