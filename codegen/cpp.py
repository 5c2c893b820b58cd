"""KernelSpec → C++: a short translation unit that picks constants and spells out the activation.

The work is in the headers beside this file; `kernel_headers` lists them in the order of their inclusion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from moec.codegen.statements import statements
from moec.codegen.storage import Storage
from moec.codegen.tuning import pairs_of_bf16
from moec.errors import CodegenError
from moec.ir.expr import Const, Expr, Var, derivative, variables
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.target import Target

HEADERS = (
    *(
        "vec.hpp",
        "pointwise.hpp",
        "args.hpp",
        "few.hpp",
        "tiles.hpp",
        "gemm.hpp",
        "packed.hpp",
        "codes.hpp",
        "router.hpp",
        "moe.hpp",
    ),
    *("outer.hpp", "backward_args.hpp", "backward.hpp"),
)
_TYPES = {"f32": "float", "bf16": "bf16", "f16": "f16"}
_CODES = {"int8": "int8", "fp8": "e4m3"}
_CHOICES = {
    "gate": ("none", "concat", "interleaved", "separate"),
    "layout_in": ("nk", "kn"),
    "layout_out": ("nk", "kn"),
    "weight_on": ("output", "input"),
    "dtype": tuple(_TYPES),
    "group_score": ("top2_sum", "max"),
    "weight_from": ("score", "choice"),
    "choose_by": ("score", "logits"),
    "compute": tuple(_TYPES),
    "score_dtype": tuple(_TYPES),
    "weight_dtype": tuple(_TYPES),
}


@lru_cache(maxsize=1)
def header_texts() -> tuple[tuple[str, str], ...]:
    """(name, text) of each header."""
    here = Path(__file__).resolve().parent
    return tuple((name, (here / name).read_text()) for name in HEADERS)


def emit(spec: KernelSpec, target: Target, router_weight: str = "f32", storage: Storage | None = None) -> str:
    """The translation unit for `spec` on `target`; `router_weight` is the dtype of the router's matrix as stored.

    With `storage` the kernel reads its own copy of the experts' matrices (then `spec` is a `panel_spec`).
    Raises CodegenError for a spec that has no C++ form.
    """
    check(spec)
    if storage and spec.experts.codes:
        raise CodegenError(f"parameters that are kept as {spec.experts.codes} are read as they are, not from a copy")
    router = () if spec.router is None else (_router(spec.router, router_weight),)
    return _unit(spec, target, "moe.hpp", (_experts(spec, target, storage), *router), _entries(spec))


def emit_backward(spec: KernelSpec, target: Target) -> str:
    """The translation unit of the experts' gradients for `spec` on `target`; sums are fp32 everywhere.

    Raises CodegenError for a spec that has no C++ form.
    """
    check(spec)
    if spec.experts.codes:
        raise CodegenError(f"no C++ kernel has gradients of experts that are kept as {spec.experts.codes}")
    size = "MOEC_EXPORT int64_t args_words() { return sizeof(BackwardArgs) / 8; }"
    run = "MOEC_EXPORT void backward(const BackwardArgs* args) { run_backward<Kernel>(*args); }"
    return _unit(spec, target, "backward.hpp", (_experts_backward(spec, target),), (size, run))


def _unit(spec: KernelSpec, target: Target, header: str, parts: Sequence[str], entries: Sequence[str]) -> str:
    lines = [
        f"// moec: {spec}",
        f"// {target.isa}: {target.lanes} lanes",
        *(f"#define MOEC_{name} {value}" for name, value in _macros(target)),
        f'#include "{header}"',
        "",
        "namespace {",
        "using namespace moec;",
        "",
        *parts,
        "}  // namespace",
        "",
        '#define MOEC_EXPORT extern "C" __attribute__((visibility("default")))',
        *entries,
    ]
    return "\n".join(lines) + "\n"


def check(spec: KernelSpec) -> None:
    """Raises CodegenError naming the field whose value no kernel knows."""
    for part in filter(None, (spec.experts, spec.router)):
        for name, allowed in _CHOICES.items():
            value = getattr(part, name, None)
            if value is not None and value not in allowed:
                raise CodegenError(f"{type(part).__name__}.{name}={value!r}: expected one of {', '.join(allowed)}")
    if spec.router:
        _check_score(spec.router)
    if spec.experts.bias_out and not spec.experts.out:
        raise CodegenError("bias_out=True with out=False: an expert without an output matrix has its biases in bias_in")
    known = {"a", "b"} if spec.experts.ab_views == 2 else {"a"}
    unknown = variables(spec.experts.phi) - known
    if unknown:
        raise CodegenError(
            f"activation {spec.experts.activation!r} reads {', '.join(sorted(unknown))}; "
            f"with gate={spec.experts.gate!r} it may read {', '.join(sorted(known))}"
        )


def _check_score(r: RouterSpec) -> None:
    if tuple(variables(r.scored)) not in (("softmax",), ("logits",)):
        raise CodegenError(f"RouterSpec.score={r.score!r}: expected an expression over softmax, or over logits")
    if tuple(variables(r.softened)) != ("logits",):
        raise CodegenError(f"RouterSpec.softmax_of={r.softmax_of!r}: expected an expression over logits")


def expression(expr: Expr) -> str:
    """An expression over vectors as C++."""
    if isinstance(expr, Var):
        return expr.name
    if isinstance(expr, Const):
        return f"splat({_number(expr.value)})"
    return f"{expr.fn}({', '.join(map(expression, expr.args))})"


def _statements(exprs: Mapping[str, Expr]) -> list[str]:
    """One line for each `target` = expression (`return`: no `=`); what occurs twice is named and computed once."""
    made = statements(exprs, expression, lambda fn, args: f"{fn}({', '.join(args)})")
    return [f"{name} {value};" if name in exprs else f"const vf {name} = {value};" for name, value in made]


def _number(value: float) -> str:
    if value != value:
        return '__builtin_nanf("")'
    if value in (float("inf"), float("-inf")):
        return f"{'-' if value < 0 else ''}__builtin_inff()"
    text = repr(float(value))
    return f"{text}f"


def _macros(target: Target) -> tuple[tuple[str, int], ...]:
    return (
        ("LANES", target.lanes),
        ("TILE_ROWS", target.tile_rows),
        ("TILE_VECTORS", target.tile_vectors),
        ("DOT_ROWS", target.dot_rows),
    )


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _panels(storage: Storage, target: Target) -> str:
    if storage.pairs:
        return "PanelTiles" if target.tiles else "PanelPairs"
    if storage.element == "int8":
        return f"Panels<int8_t, {storage.group or 'ALL'}>"
    return f"Panels<{_TYPES[storage.element]}>"


def _stored(e: ExpertsSpec, target: Target) -> str:
    """How rows meet matrices that are read as they are stored."""
    coding = e.coding
    if coding is None:
        pairs = "TilePairs" if target.tiles else "DotPairs"
        return pairs if pairs_of_bf16(e, target) else f"Fma<{_TYPES[e.dtype]}>"
    if not coding.scaled:
        return f"Fma<{_TYPES[coding.element]}>"
    return f"Coded<{_CODES[coding.element]}, {_TYPES[e.dtype]}, {coding.rows}, {coding.columns}>"


def _experts(spec: KernelSpec, target: Target, storage: Storage | None) -> str:
    e: ExpertsSpec = spec.experts
    op = _panels(storage, target) if storage else _stored(e, target)
    layouts = ("panels", "panels") if storage else (e.layout_in, e.layout_out)
    types = (f"using Op = {op};", f"using Param = {_TYPES[e.dtype]};", f"using Y = {_TYPES[spec.y_dtype]};", _bias(e))
    return _kernel(spec, types, layouts, "vf phi", "", (e.phi,), _statements({"return": e.phi}))


def _bias(e: ExpertsSpec) -> str:
    return f"using Bias = {_TYPES[e.stored('bias_out')]};"


def _experts_backward(spec: KernelSpec, target: Target) -> str:
    """h = φ(a, b) with both of its slopes: ∂φ/∂a and, where there is a b, ∂φ/∂b."""
    e: ExpertsSpec = spec.experts
    outputs = {"h =": e.phi, "da =": derivative(e.phi, "a")}
    outputs["db ="] = derivative(e.phi, "b") if e.ab_views == 2 else Const(0.0)
    layouts = (e.layout_in, e.layout_out)
    return _kernel(
        spec,
        (f"using Op = {_stored(e, target)};", _bias(e)),
        layouts,
        "void slopes",
        ", vf& h, vf& da, vf& db",
        tuple(outputs.values()),
        _statements(outputs),
    )


def _kernel(
    spec: KernelSpec,
    types: Sequence[str],
    layouts: tuple[str, str],
    name: str,
    more: str,
    read: Sequence[Expr],
    body: Sequence[str],
) -> str:
    e = spec.experts
    used = frozenset[str]().union(*map(variables, read))
    first, second = ("vf a" if "a" in used else "vf"), ("vf b" if "b" in used else "vf")
    head, lines = "\n".join(f"  {line}" for line in types), "\n".join(f"    {line}" for line in body)
    return f"""struct Kernel {{
{head}
  static constexpr Gate gate = Gate::{e.gate};
  static constexpr Layout layout_in = Layout::{layouts[0]}, layout_out = Layout::{layouts[1]};
  static constexpr bool bias_in = {_flag(e.bias_in)}, bias_out = {_flag(e.bias_out)};
  static constexpr bool weight_on_input = {_flag(e.weight_on == "input")}, out = {_flag(e.out)};
  static MOEC_INLINE {name}({first}, {second}{more}) {{
{lines}
  }}
}};
"""


def _router(r: RouterSpec, weight: str) -> str:
    given = "softmax" if r.softmax else "logits"
    maps_logits, maps_score = r.softened != Var("logits"), r.scored != Var(given)
    functions = (_function("softmax_of", "logits", r.softened) if maps_logits else "") + (
        _function("score", given, r.scored) if maps_score else ""
    )
    return f"""struct Router {{
  using Weight = {_TYPES[weight]};
  using Compute = {_TYPES[r.compute]};
  using ScoreType = {_TYPES[r.score_dtype]};
  static constexpr bool softmax = {_flag(r.softmax)};
  static constexpr bool maps_logits = {_flag(maps_logits)}, maps_score = {_flag(maps_score)};
{functions}  static constexpr int64_t groups = {r.groups}, topk_group = {r.topk_group};
  static constexpr GroupScore group_score = GroupScore::{r.group_score};
  static constexpr float masked_value = {_number(r.masked_value)};
  static constexpr bool sorted = {_flag(r.sorted)}, weight_from_choice = {_flag(r.weight_from == "choice")};
  static constexpr bool choose_by_logits = {_flag(r.choose_by == "logits")};
  static constexpr bool softmax_over_k = {_flag(r.softmax_over_k)}, renormalize = {_flag(r.renormalize)};
  static constexpr float eps = {_number(r.eps)}, clamp_min = {_number(r.clamp_min)}, scale = {_number(r.scale)};
}};
"""


def _function(name: str, given: str, expr: Expr) -> str:
    """A member function of one vector."""
    lines = "".join(f"    {line}\n" for line in _statements({"return": expr}))
    return f"  static MOEC_INLINE vf {name}(vf {given}) {{\n{lines}  }}\n"


def _entries(spec: KernelSpec) -> list[str]:
    kinds = {"moe": "Router", "experts": "void"} if spec.router else {"experts": "void"}
    size = "MOEC_EXPORT int64_t args_words() { return sizeof(Args) / 8; }"
    runs = (f"MOEC_EXPORT void {name}(const Args* args) {{ run<Kernel, {r}>(*args); }}" for name, r in kinds.items())
    return [size, *runs]
