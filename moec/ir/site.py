"""The words of the IR: what an MoE layer is made of, as frozen values.

The smallest set that covers the published systems. Dims are sympy expressions over the letters
T tokens, E experts, k experts a token, H hidden, F expert width, O output width, C capacity.
Each value prints as one line of its site's block; `moec.ir.site_text` prints whole sites,
`moec.ir.site_parse` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from moec.ir.graph import Type

Dim = sympy.Expr


@dataclass(frozen=True)
class Score:
    """Any differentiable map x → s[T, E].

    fn is the score function (`softmax`, `sigmoid`, …, `logits`) of `linear(x, weight) + bias` computed in `compute`;
    `opaque` is a subgraph of the user's own. row_local: token t's scores depend on token t alone.
    """

    fn: str
    weight: str = ""
    bias: str = ""
    compute: str = "f32"
    dtype: str = "f32"
    row_local: bool = True
    mutates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Select:
    """s[T, E] → experts[T, k].

    algorithm: topk | argmax | expert_choice | segment_topk | sinkhorn | assignment | table | threshold | given.
    budget: what the count is bounded per (token, expert, segment). nnz: chosen pairs, symbolic in T.
    """

    algorithm: str
    k: Dim
    nnz: Dim
    budget: str = "token"
    bias: str = ""
    groups: int = 1
    topk_group: int = 1
    group_score: str = "top2_sum"
    masked_value: float = float("-inf")
    sorted: bool = True


@dataclass(frozen=True)
class Weight:
    """Combine weights [T, k]: source → softmax over k → renormalised → scaled → cast.

    source: score (at the chosen experts), choice (the values that were compared) or given (a value of the graph).
    """

    source: str
    softmax_over_k: bool = False
    renormalize: bool = False
    eps: float = 0.0
    clamp_min: float = 0.0
    scale: float = 1.0
    dtype: str = "f32"


@dataclass(frozen=True)
class Capacity:
    """At most `limit` rows an expert in each of `queues` groups of tokens, kept by `order` (position | choice | score).

    drop: zero | passthrough | never (proved: no choice of experts makes a longer queue).
    """

    limit: Dim
    order: str = "position"
    drop: str = "zero"
    queues: Dim = sympy.S.One


@dataclass(frozen=True)
class Dispatch:
    """Rows in expert-major order with offsets[E + 1]; granularity: token | sequence | sample."""

    rows: Dim
    granularity: str = "token"
    padding: int = 1


@dataclass(frozen=True)
class ParamTransform:
    """A map on an expert's parameters before the body: identity | merge | usv | dequant | replica | lora."""

    kind: str = "identity"
    params: tuple[str, ...] = ()


@dataclass(frozen=True)
class Body:
    """What an expert does with one row: mlp | gated, or without an output matrix linear | glu, or opaque.

    activation is an expression over the projections a and b (`mul(silu(a), b)`); params are (role, value name[s]) pairs
    in kernel order; layouts: nk (output axis first) or kn.
    """

    kind: str
    activation: str
    width: Dim
    gate: str = "none"
    layout_in: str = "nk"
    layout_out: str = "nk"
    params: tuple[tuple[str, tuple[str, ...]], ...] = ()
    dtype: str = "f32"
    transform: ParamTransform = field(default_factory=ParamTransform)


@dataclass(frozen=True)
class Combine:
    """y[t] = Σ_s w[t, s] · rows[t, s] in `accumulate`; weight_on: output | input (of the body); then `epilogue`s."""

    weight_on: str = "output"
    accumulate: str = "f32"
    dtype: str = "f32"
    epilogue: tuple[str, ...] = ()


@dataclass(frozen=True)
class SharedExpert:
    """A dense expert that every token visits beside the routed ones, optionally gated by a sigmoid."""

    activation: str
    width: Dim
    gated: bool = False


@dataclass(frozen=True)
class State:
    """A value that crosses layers or steps: momentum, counters, codebooks, random numbers."""

    name: str
    update: str
    scope: str = "layer"


@dataclass(frozen=True)
class Aux:
    """A side output (router logits, histogram, loss) that never blocks fusion."""

    kind: str
    value: str


@dataclass(frozen=True)
class Guard:
    """A predicate on shape, histogram, mode or gradient that selects a plan."""

    predicate: str


@dataclass(frozen=True)
class Plan:
    """Where the experts run: device, engine, and (later) placement of expert segments."""

    device: str = "cpu"
    engine: str = "auto"
    fuse_router: bool = True
    training: bool = False


@dataclass(frozen=True)
class Site:
    """One MoE layer: `%x` → `%y`, everything between understood."""

    name: str
    x: str
    y: str
    x_type: Type
    y_type: Type
    num_experts: Dim
    score: Score
    select: Select
    weight: Weight
    dispatch: Dispatch
    body: Body
    combine: Combine
    capacity: Capacity | None = None
    shared: SharedExpert | None = None
    states: tuple[State, ...] = ()
    aux: tuple[Aux, ...] = ()
    guards: tuple[Guard, ...] = ()
    plan: Plan = field(default_factory=Plan)
    form: str = ""
    loc: str = ""
