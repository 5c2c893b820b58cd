"""Shared by the benchmarks: layers, library blocks on shared weights, correctness, where results go."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moec.demo_check import TOLERANCE, reference, relative_error
from moec.demo_forms import MoE, make_moe
from moec.measure import Layer, environment_line

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer: H hidden, F expert width, E experts, k experts a token."""

    hidden: int
    width: int
    experts: int
    top_k: int

    def layer(self, dtype: torch.dtype) -> Layer:
        """With a dtype, for limits."""
        return Layer(self.hidden, self.width, self.experts, self.top_k, dtype.itemsize)


# Many small experts (30B-A3B models) and few large ones (8x7B-like, at half the hidden size).
LAYERS: Mapping[str, Shape] = {
    "A": Shape(2048, 768, 64, 8),
    "B": Shape(1024, 3584, 8, 2),
    "tiny": Shape(64, 32, 8, 2),
}


def library_block(shape: Shape, implementation: str, plain: MoE) -> nn.Module:
    """The transformers block of this shape on `plain`'s parameters; implementation: eager, grouped_mm or batched_mm."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(copy.deepcopy(config))
    block.gate.weight = plain.gate.weight
    block.experts.gate_up_proj, block.experts.down_proj = plain.experts.gate_up, plain.experts.down
    return block.eval()


def plain_layer(shape: Shape, dtype: torch.dtype) -> MoE:
    """The parameters, in the demo's plain module."""
    torch.manual_seed(0)
    return make_moe(shape.hidden, shape.width, shape.experts, shape.top_k, dtype)


def layer_inputs(shape: Shape, dtype: torch.dtype, tokens: tuple[int, ...]) -> dict[int, Tensor]:
    """The same x [T, H] in every process, by T."""
    torch.manual_seed(1)
    return {t: torch.randn(t, shape.hidden).to(dtype) for t in tokens}


def active_experts(plain: MoE, x: Tensor) -> int:
    """Distinct experts that x [T, H] hits."""
    return int(plain.gate(x).topk(plain.top_k).indices.unique().numel())


@dataclass(frozen=True)
class Wanted:
    """The fp32 result and the tokens whose choice of experts does not hang on rounding."""

    exact: Tensor
    clear: Tensor
    tolerance: float

    def verdict(self, y: Tensor) -> str:
        """Empty where y is right, else how wrong."""
        error = relative_error(y.reshape(self.exact.shape)[self.clear], self.exact[self.clear])
        return "" if error <= self.tolerance else f"WRONG: relative error {error:.1e}, allowed {self.tolerance:.0e}"


def wanted(plain: MoE, x: Tensor) -> Wanted:
    """What every way must give for x [T, H]."""
    logits = plain.gate(x)
    best = logits.float().topk(min(plain.top_k + 1, logits.shape[1]), dim=-1).values
    gap = best[:, plain.top_k - 1] - best[:, -1] if best.shape[1] > plain.top_k else torch.full((len(x),), torch.inf)
    clear = gap > 4 * torch.finfo(x.dtype).eps * logits.float().abs().amax(-1)
    return Wanted(reference(plain, x, logits.topk(plain.top_k).indices), clear, TOLERANCE[x.dtype])


def write_json(name: str, data: dict[str, Any], path: Path | None = None) -> Path:
    """Write results with the environment and the date; returns where."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    path.write_text(json.dumps({"date": stamp, "environment": environment_line(), **data}, indent=2) + "\n")
    return path
