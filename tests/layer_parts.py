"""The choices of one sampled MoE layer, and what there is to choose from."""

from __future__ import annotations

from dataclasses import dataclass

H = 8


@dataclass(frozen=True)
class Sample:
    """One module: `make()` in its source returns it.

    supported  moec says that it knows every part of it, so it must be fused
    name       its parts, for the summary
    """

    source: str
    tokens: int
    dtype: str
    training: bool
    supported: bool
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    """The choices of one sample; `twist` other than 'none' is one that moec need not know."""

    experts: int
    k: int
    width: int
    router: str
    gate_bias: bool
    select: str
    weights: str
    scale: float
    dispatch: str
    body: str
    act: str
    bias: bool
    combine: str
    twist: str
    extra: str


ROUTERS = ("linear", "functional", "matmul", "einsum", "float")
SELECTS = (
    "softmax",
    "softmax_f32",
    "sigmoid",
    "sigmoid_bias",
    "topk_softmax",
    "groups",
    "softplus",
    "logits",
    "scattered",
)
WEIGHTS = ("plain", "normal", "normal_eps", "normal_inplace", "normal_clamp")
LOOPS = ("where_loop", "mask_loop", "hit_loop", "enumerate_loop", "nonzero_loop")
STACKED = ("stacked_loop", "gathered_bmm", "gathered_einsum", "grouped", "dense_bmm", "dense_einsum")
BODIES = ("gated", "gated_swapped", "interleaved", "plain", "separate")
ACTS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "swish", "relu2", "clamped")
COMBINES = ("index_add", "setitem", "scatter_add", "index_put")
EXTRAS = ("none", "residual", "logits", "shared", "three_axes", "aux")
TWISTS = (
    "weights_squared",
    "weight_inside",
    "skip_expert",
    "extra_scale_token",
    "norm",
    "wrong_slot",
    "weights_by_choice",
    "smallest",
    "second_user",
    "count_used",
    "rows_mixed",
    "one_bias",
    "tied",
    "shifted_choice",
    "weight_twice",
    "axis",
)
