"""KernelSpec: the frozen, hashable, printable description of one MoE layer that kernels are generated from.

A spec holds structure and dtypes, never sizes: T, H, F, O, E and k come from the tensors of each call.
Its one-line text is what the graph carries (`str(spec)`), and `KernelSpec.parse` reads it back.

Letters: T tokens, H hidden, F expert width, O output width (H in most layers), E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeVar

import sympy
import torch

from moec.errors import ParseError
from moec.ir import expr as ex
from moec.ir.coding import Coding
from moec.ir.dtypes import DTYPES, STORED

N = TypeVar("N", int, sympy.Expr)  # a size, or its letter


@dataclass(frozen=True)
class RouterSpec:
    """How tokens choose experts: logits → score → choice → top-k → weights.

    logits  = linear(x, W[E, H]) + bias, both operands first cast to `compute`, result rounded to `compute`
    score   = a pointwise expression over `logits`, or over `softmax`: the softmax over E of the pointwise `softmax_of`
              of the logits; in fp32 but for what the expressions round, the result rounded to `score_dtype`
    choice  = score (or the logits themselves, by `choose_by`) + selection_bias[E];
              outside the `topk_group` best of `groups` groups replaced by `masked_value`
    experts = top-k indices of choice (torch.topk's own tie-breaking; `sorted` as torch.topk's)
    weights = score (or choice) there → softmax over k → divided by their sum → times `scale` → `weight_dtype`
    """

    compute: str = "f32"
    bias: bool = False
    score: str = "softmax"
    softmax_of: str = "logits"
    score_dtype: str = "f32"
    choose_by: str = "score"
    selection_bias: bool = False
    groups: int = 1
    topk_group: int = 1
    group_score: str = "top2_sum"
    masked_value: float = float("-inf")
    sorted: bool = True
    weight_from: str = "score"
    softmax_over_k: bool = False
    renormalize: bool = False
    eps: float = 0.0
    clamp_min: float = 0.0
    scale: float = 1.0
    weight_dtype: str = "f32"

    @property
    def scored(self) -> ex.Expr:
        """The score as a tree over `logits` or `softmax`."""
        return ex.parse(self.score)

    @property
    def softened(self) -> ex.Expr:
        """What the softmax is taken of, as a tree over `logits`."""
        return ex.parse(self.softmax_of)

    @property
    def softmax(self) -> bool:
        """Whether the score is one of the softmax over all experts."""
        return "softmax" in ex.variables(self.scored)

    @property
    def score_text(self) -> str:
        """The score function for people: one function by its name, else the whole expression."""
        whole = ex.substituted(self.scored, {"softmax": ex.Var(f"softmax({self.softmax_of})")})
        text = str(whole)
        return text.removesuffix("(logits)") if text.count("(") == 1 else text


@dataclass(frozen=True)
class ExpertsSpec:
    """One expert's function of a row x[H]: y[O] = W_out · φ(W_a·x + b_a, W_b·x + b_b) + b_out.

    gate        none: φ(a); concat: one tensor holds a's rows, then b's; interleaved: a and b alternate;
                separate: two tensors
    layout_in   nk: [E, F, H], H contiguous (F is 2F when a and b share a tensor); kn: [E, H, F], F contiguous
    layout_out  nk: [E, O, F], F contiguous; kn: [E, F, O], O contiguous
    activation  φ as an expression over a and b
    weight_on   output: y is multiplied by the routing weight; input: x is
    stacked     True: one [E, …] tensor a parameter; False: E separate tensors (a ModuleList), bound by pointer table
    out         False: there is no second product, y = φ(W_a·x + b_a, W_b·x + b_b), and O is F
    biases      the dtype of biases, which are added to fp32 sums; empty: `dtype`
    codes       how matrices are kept (a `moec.ir.coding.Coding`'s text); empty: in `dtype`. int8 and fp8 have scales in
                fp32, groups of their own. Products are computed in `dtype` in any case
    """

    dtype: str = "f32"
    gate: str = "concat"
    layout_in: str = "nk"
    layout_out: str = "nk"
    activation: str = "mul(silu(a), b)"
    bias_in: bool = False
    bias_out: bool = False
    weight_on: str = "output"
    stacked: bool = True
    codes: str = ""
    out: bool = True
    biases: str = ""

    @property
    def coding(self) -> Coding | None:
        """How matrices are kept where that is not in `dtype`."""
        return Coding.parse(self.codes) if self.codes else None

    @property
    def phi(self) -> ex.Expr:
        """The activation as a tree."""
        return ex.parse(self.activation)

    @property
    def param_groups(self) -> tuple[str, ...]:
        """The parameter groups in the order in which an op takes them.

        Each group is one tensor when `stacked`, else E tensors in expert order.
        """
        first = ("a", "b") if self.gate == "separate" else ("ab",)
        biases = tuple(f"bias_{g}" for g in first) if self.bias_in else ()
        matrices = (*first, "out") if self.out else first
        scales = tuple(f"scale_{g}" for g in matrices) if self.coding and self.coding.scaled else ()
        return (*matrices, *biases, *(("bias_out",) if self.bias_out else ()), *scales)

    def stored(self, group: str) -> str:
        """The element type of a parameter group: f32, bf16, f16, int8 or fp8."""
        if group.startswith("scale_"):
            return "f32"
        if group.startswith("bias_"):
            return self.biases or self.dtype
        return self.coding.element if self.coding else self.dtype

    def layout(self, group: str) -> str:
        """nk or kn, of the matrices of a parameter group, or of their scales."""
        return self.layout_out if group.endswith("out") else self.layout_in

    def shape(self, group: str, H: N, F: N, O: N | None = None) -> tuple[N, ...]:
        """(rows, columns) of one expert's matrix or of its scales, its rows being outputs; (rows,) of its bias.

        Without O, experts give rows as wide as they read them.
        """
        wide = H if O is None else O
        if group.startswith("scale_"):
            assert self.coding is not None
            rows, columns = self.shape(group.removeprefix("scale_"), H, F, O)
            return self.coding.scale_shape(rows, columns)
        width = 2 * F if self.gate in ("concat", "interleaved") else F
        if group.startswith("bias_"):
            return (wide,) if group == "bias_out" else (width,)
        return (wide, F) if group == "out" else (width, H)

    def stored_shape(self, group: str, H: N, F: N, O: N | None = None) -> tuple[N, ...]:
        """The shape of one expert's parameter as it is stored."""
        shape = self.shape(group, H, F, O)
        return shape if self.layout(group) == "nk" else shape[::-1]

    @property
    def ab_views(self) -> int:
        """How many projections φ reads: 1 for a plain MLP, 2 for a gated one."""
        return 1 if self.gate == "none" else 2


@dataclass(frozen=True)
class KernelSpec:
    """One MoE layer. `router` None: routing weights and experts are computed by the caller's own graph."""

    experts: ExpertsSpec
    router: RouterSpec | None = None
    y_dtype: str = "f32"

    def __str__(self) -> str:
        router = "" if self.router is None else f"{_fields_text('router', self.router)} "
        return f"{router}{_fields_text('experts', self.experts)} -> {self.y_dtype}"

    @staticmethod
    def parse(text: str) -> KernelSpec:
        """The spec that prints as `text`; raises ParseError."""
        return _parse(text)


def stored_dtypes(s: ExpertsSpec, count: int) -> list[torch.dtype]:
    """The dtype of each of a spec's `count` parameters."""
    groups = s.param_groups
    return [STORED[s.stored(group)] for group in groups for _ in range(count // len(groups))]


def widths(s: ExpertsSpec, params: Sequence[torch.Tensor]) -> tuple[int, int, int]:
    """(H, F, O), from the tensors of a spec's parameter groups."""
    groups, first = s.param_groups, params[0].shape
    rows, hidden = (first[-2], first[-1]) if s.layout_in == "nk" else (first[-1], first[-2])
    if not s.out:
        width = rows // 2 if s.gate in ("concat", "interleaved") else rows
        return hidden, width, width
    out = params[groups.index("out") * (1 if s.stacked else len(params) // len(groups))].shape
    wide, deep = (out[-2], out[-1]) if s.layout_out == "nk" else (out[-1], out[-2])
    return hidden, deep, wide


def _fields_text(name: str, spec: RouterSpec | ExpertsSpec) -> str:
    """`name{field=value; …}` with the fields that differ from their defaults."""
    changed = (f for f in fields(spec) if getattr(spec, f.name) != f.default)
    return name + "{" + "; ".join(f"{f.name}={getattr(spec, f.name)}" for f in changed) + "}"


def _parse_fields(text: str, cls: type[RouterSpec] | type[ExpertsSpec]) -> dict[str, Any]:
    known = {f.name: f for f in fields(cls)}
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        name, _, value = item.partition("=")
        if name not in known:
            raise ParseError(f"{cls.__name__}: unknown field {name!r}; known: {', '.join(known)}")
        values[name] = _field_value(cls, name, value, type(known[name].default))
    return values


def _field_value(cls: type, name: str, value: str, kind: type) -> Any:
    """`value` as a bool, int, float or str."""
    try:
        return {"True": True, "False": False}[value] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise ParseError(f"{cls.__name__}: {name}={value!r}; expected a value of type {kind.__name__}") from None


@lru_cache(maxsize=1024)
def _parse(text: str) -> KernelSpec:
    body, arrow, y_dtype = text.rpartition(" -> ")
    if not arrow or y_dtype not in DTYPES:
        raise ParseError(f"kernel spec {text!r}: expected it to end in ' -> f32|bf16|f16'")
    router: RouterSpec | None = None
    if body.startswith("router{"):
        inside, closed, body = body.removeprefix("router{").partition("} ")
        if not closed:
            raise ParseError(f"kernel spec {text!r}: expected 'router{{…}} experts{{…}}'")
        router = RouterSpec(**_parse_fields(inside, RouterSpec))
    if not (body.startswith("experts{") and body.endswith("}")):
        raise ParseError(f"kernel spec {text!r}: expected 'experts{{…}}'")
    experts = ExpertsSpec(**_parse_fields(body.removeprefix("experts{").removesuffix("}"), ExpertsSpec))
    return KernelSpec(experts, router, y_dtype)
