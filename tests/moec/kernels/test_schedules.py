"""The machine code of the ways grouped products run, at Mixtral's dimensions: what is asked for is really there."""

import pytest

from moec.codegen.plan import Sizes
from moec.errors import OptionError
from moec.gpu.offline import Compiled
from moec.gpu.target import gpu_target
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.kernels.compiled import compile_layers
from moec.kernels.jobs import Request

SPEC = KernelSpec(ExpertsSpec(dtype="bf16"), None, "bf16")
SIZES = Sizes(T=4096, H=4096, F=14336, E=8, k=2)
TILE = {"block_m": 128, "block_n": 256, "block_k": 64, "num_stages": 4}
DESCRIBED = {**TILE, "num_warps": 8, "weights": "descriptors"}
SPECIALIZED = {
    **TILE, "num_warps": 4, "weights": "descriptors", "programs": 132, "combine": "separate", "specialized": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def figures(config, target, cache):
    request = Request(SPEC, SIZES, gpu_target(target), tuple(config.items()))
    ((kernel,),) = (layer.kernels for layer in compile_layers([("layer", request)], cache, 300, ("gate_up",)))
    assert isinstance(kernel.result, Compiled), kernel.result
    assert kernel.result.figures.problems == ()
    return kernel.result.figures


def test_descriptors_load_weights_and_shorten_no_loop_beyond_its_aim(cache):
    made = figures(DESCRIBED, "sm_90", cache)
    assert made.loop.loads["UTMALDG"] == 1
    assert made.loop.per_step <= 105
    assert set(made.loop.mma) == {"HGMMA.64x256x16"}
    assert not made.specialized


def test_specialized_warps_are_really_there(cache):
    made = figures(SPECIALIZED, "sm_90", cache)
    assert made.specialized
    assert made.warps == 12  # one warp group loads, two multiply
    assert made.loop.per_step <= 55
    assert not made.loop.loads


@pytest.mark.parametrize(("config", "target"), [(DESCRIBED, "sm_80"), (DESCRIBED, "gfx942"), (SPECIALIZED, "sm_120")])
def test_targets_without_the_hardware_are_an_error(config, target):
    with pytest.raises(OptionError, match=f"{target} has no"):
        _ = Request(SPEC, SIZES, gpu_target(target), tuple(config.items())).full_config
