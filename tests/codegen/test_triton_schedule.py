"""Ways to run the grouped products: which the option gives, which the tuner tries, none where a target lacks it."""

from dataclasses import replace

import pytest

from moec.codegen.cost_model import fits
from moec.codegen.plan import Sizes
from moec.codegen.triton_config import GpuConfig, check_target, default_config
from moec.codegen.triton_launch import program
from moec.codegen.triton_schedule import candidates, scheduled
from moec.errors import CodegenError, OptionError
from moec.gpu.target import gpu_target, gpu_targets
from moec.ir.engine import SCHEDULES, Engine
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.options import Options

SPEC = KernelSpec(ExpertsSpec("bf16"), None, "bf16")
APART = KernelSpec(ExpertsSpec("bf16", stacked=False), None, "bf16")
SIZES = Sizes(64, 2048, 768, 128, 8)
DEEP = GpuConfig(16, 128, 128, 1, 4, 4)


def run_as(schedule, config=DEEP, target="sm_90"):
    return scheduled(config, schedule, gpu_target(target))


@pytest.mark.parametrize("target", [t.name for t in gpu_targets()])
@pytest.mark.parametrize("spec", [SPEC, APART], ids=["stacked", "apart"])
def test_every_candidate_is_there_on_its_target(target, spec):
    gpu = gpu_target(target)
    for tokens in (1, 64, 4096):
        sizes = replace(SIZES, T=tokens)
        found = candidates(spec, sizes, gpu, 3)
        assert found[0] == default_config(spec, sizes, gpu)
        assert len(set(found)) == len(found)
        for config in found:
            assert check_target(config, gpu) is config
            assert program(spec, sizes, config).launches
        described = any(c.weights == "descriptors" for c in found)
        assert described == (spec.experts.stacked and gpu.can("tma") and tokens > 1)
        assert not any(c.specialized for c in found) or gpu.can("tma", "warp_specialize")
    assert any(c.specialized for c in found) == (spec.experts.stacked and gpu.can("tma", "warp_specialize"))
    assert any(c.programs for c in found)


def test_what_is_near_the_default_is_tried_too():
    few = candidates(SPEC, replace(SIZES, T=1), gpu_target("sm_90"))
    default = few[0]
    assert {c.block_n for c in few} == {4, 8, 16}
    assert {c.block_k for c in few} == {default.block_k // 2, default.block_k, 2 * default.block_k}
    many = candidates(SPEC, replace(SIZES, T=4096), gpu_target("sm_90"))
    tile = many[0]
    stages = {c.num_stages for c in many if c == replace(tile, num_stages=c.num_stages)}
    assert stages == {tile.num_stages - 1, tile.num_stages}, "one more does not fit"
    assert not fits(replace(tile, num_stages=tile.num_stages + 1), gpu_target("sm_90"), "bf16")
    assert {c.group_m for c in many if c == replace(tile, group_m=c.group_m)} == {16, 32, 64}


def test_a_tile_has_the_stages_that_fit():
    """On an H100 a tile with 3 stages took 0.94 ms where it took 1.18 with 2."""
    gpu = gpu_target("sm_90")
    for config in candidates(SPEC, replace(SIZES, T=4096), gpu)[6:]:
        deeper = replace(config, num_stages=config.num_stages + 1)
        assert config.num_stages >= 3 or not fits(deeper, gpu, "bf16"), config


def test_pointers_are_the_default():
    assert Options().engine(False).schedule == "pointers"
    assert all(run_as("pointers", target=t.name) is DEEP for t in gpu_targets())


def test_a_way_that_is_asked_for_is_taken_or_an_error():
    assert run_as("persistent", target="gfx942").programs == 304
    special = run_as("specialized")
    assert (special.specialized, special.block_m, special.num_warps, special.combine) == (True, 128, 4, "separate")
    with pytest.raises(CodegenError, match="sm_80 has no tma"):
        run_as("descriptors", target="sm_80")
    with pytest.raises(CodegenError, match="combine='ordered'"):
        run_as("specialized", replace(DEEP, combine="atomic"))
    few = GpuConfig(16, 16, 256, variant="decode")
    assert all(run_as(name, few) is few for name in SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_option_reads_back_from_the_text_in_a_graph(name):
    engine = Options.make({"schedule": name}).engine(False)
    assert engine.schedule == name
    assert Engine.parse(str(engine)) == engine
    assert Options.make({"schedule": name}).engine(True).schedule == name
    with pytest.raises(OptionError, match="did you mean 'specialized'"):
        Options.make({"schedule": "specialised"})
