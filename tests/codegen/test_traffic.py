"""Bytes of a layer at real dimensions, counted from the launches' arguments, beside the fewest there can be."""

import pytest

from moec.codegen.cost_model import uniform_histogram
from moec.codegen.plan import Sizes
from moec.codegen.traffic import Load, least_bytes, moved_bytes
from moec.codegen.triton_config import default_config
from moec.codegen.triton_launch import program
from moec.gpu.target import gpu_target
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec

LAYERS = {
    "Mixtral-8x7B": (4096, 14336, 8, 2),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "DeepSeek-V3": (7168, 2048, 256, 8),
}
ROUTER = RouterSpec(compute="bf16", renormalize=True, weight_dtype="bf16")


def counted(codes, layer, tokens, target="sm_90"):
    H, F, E, k = LAYERS[layer]
    sizes = Sizes(tokens, H, F, E, k)
    spec = KernelSpec(ExpertsSpec("bf16", codes=codes), ROUTER, "bf16")
    config = default_config(spec, sizes, gpu_target(target))
    load = Load(spec, sizes, uniform_histogram(sizes))
    moved = moved_bytes(load, program(spec, sizes, config))
    return sum(sum(part.values()) for part in moved.values()), least_bytes(load, config.variant == "sorted"), moved


@pytest.mark.parametrize("codes", ["", "fp8:128", "int8"])
@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("layer", LAYERS)
def test_at_most_five_percent_above_the_least(layer, tokens, codes):
    total, least, _ = counted(codes, layer, tokens)
    assert least <= total <= 1.05 * least


def test_figures():
    total, _, moved = counted("", "Mixtral-8x7B", 1)
    weights = 2 * 3 * 4096 * 14336 * 2
    assert moved["decode_route_gate_up"]["ab"] + moved["decode_down"]["out"] == weights
    assert total < 1.001 * weights
    _, _, coded = counted("int8", "Mixtral-8x7B", 1)
    assert coded["decode_down"]["out"] == moved["decode_down"]["out"] // 2
    assert coded["decode_down"]["scale_out"] == 2 * 4096 * 4
