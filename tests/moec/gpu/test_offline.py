"""Kernels are compiled for GPUs that are not there; what the compiler does wrong costs one kernel."""

import gzip
import time

import pytest
from triton_job import SOURCE, grouped_job

from moec.errors import OptionError
from moec.gpu.figures import Dots, problems, source_dots
from moec.gpu.occupancy import Occupancy, occupancy
from moec.gpu.offline import Compiled, Job, Pointer, Refused, compile_offline
from moec.gpu.target import gpu_target, gpu_targets


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("name", "mma", "loads"),
    [
        ("sm_80", "HMMA.16816", "LDGSTS.128"),
        ("sm_90", "HGMMA.64x128x16", "LDGSTS.128"),
        ("sm_100", "UTCHMMA", "LDGSTS.128"),
        ("gfx942", "v_mfma_f32_32x32x8_bf16", "buffer_load_dwordx4"),
    ],
)
def test_grouped_product(name, mma, loads, cache):
    target = gpu_target(name)
    done = compile_offline(grouped_job(num_stages=2), target, cache)
    assert isinstance(done, Compiled), done
    figures = done.figures
    assert figures.problems == ()
    assert figures.dots == Dots((128, 128, 64), 2.0 * 128 * 128 * 64, "bf16", True)
    assert set(figures.loop.mma) == {mma}
    assert set(figures.loop.loads) == {loads}
    assert figures.loop.steps in (1, 2)
    assert 50 <= figures.loop.per_step <= 150
    assert 0 < figures.shared <= figures.shared_limit
    assert figures.warps == 8
    assert figures.occupancy.blocks >= 1
    assert mma.partition(".")[0] in done.assembly


def test_pointers_past_2_gb_change_amd_loads(cache):
    """The size is specialised on as at a real call: large weights are not read through a buffer descriptor."""
    done = compile_offline(grouped_job(num_stages=2, weight_bytes=3 << 30), gpu_target("gfx942"), cache)
    assert isinstance(done, Compiled)
    assert set(done.figures.loop.loads) == {"buffer_load_dwordx4", "global_load_dwordx4"}


def test_shared_memory_over_the_limit_is_found(cache):
    done = compile_offline(grouped_job(tile=(128, 128, 128), num_stages=4), gpu_target("sm_86"), cache)
    assert isinstance(done, Compiled)
    assert done.figures.shared > 99 << 10
    assert done.figures.occupancy.blocks == 0
    assert any("over the limit of 101376 B" in problem for problem in done.figures.problems)


def test_kernel_without_a_loop(cache):
    job = Job(SOURCE, "copy", {"x": Pointer("fp32", 4096), "y": Pointer("fp32", 4096), "N": 1024})
    done = compile_offline(job, gpu_target("sm_80"), cache)
    assert isinstance(done, Compiled)
    assert (done.figures.dots, done.figures.loop, done.figures.mma) == (None, None, {})
    assert done.figures.loads == {"LDG.128": 2}
    assert done.figures.problems == ()


def test_rejected_source_is_a_value(cache):
    refused = compile_offline(Job(SOURCE, "wrong", {"x": Pointer("fp32", 4096), "N": 100}), gpu_target("sm_90"), cache)
    assert isinstance(refused, Refused)
    assert "power of 2" in refused.reason
    assert "\n" not in refused.reason


def test_missing_kernel_is_a_value(cache):
    refused = compile_offline(Job(SOURCE, "absent", {}), gpu_target("sm_90"), cache)
    assert isinstance(refused, Refused)
    assert "absent" in refused.reason


def test_hang_costs_its_time_limit(cache):
    start = time.monotonic()
    refused = compile_offline(Job("import time\ntime.sleep(600)", "k", {}), gpu_target("sm_90"), cache, timeout=3)
    assert isinstance(refused, Refused)
    assert "did not finish within 3 s" in refused.reason
    assert time.monotonic() - start < 30


def test_crash_is_a_value(cache):
    refused = compile_offline(Job("import os\nos.abort()", "k", {}), gpu_target("sm_90"), cache)
    assert isinstance(refused, Refused)
    assert "crashed (SIGABRT)" in refused.reason


def test_problems_name_what_is_wrong(cache):
    done = compile_offline(grouped_job("fp16", (64, 64, 32), 4, 2), gpu_target("sm_75"), cache)
    assert isinstance(done, Compiled)
    assert "no matrix instruction for f16" in done.figures.problems  # Triton has none for this architecture
    assert problems(gpu_target("sm_75"), done.figures) == done.figures.problems


def test_source_dots_of_nested_loops():
    ttir = """
    scf.for %i = %a to %b {
      %0 = tt.dot %x, %y, %z : tensor<16x16xf16> * tensor<16x16xf16> -> tensor<16x16xf32> loc(#loc)
      %1 = scf.for %j = %a to %b iter_args(%c = %z) -> (tensor<64x128xf32>) : i32 {
        %2 = scf.if %p -> (i1) {
          %3 = tt.dot %x, %y, %c : tensor<64x32xbf16> * tensor<32x128xbf16> -> tensor<64x128xf32> loc(#loc)
        } else {
        }
        %4 = tt.dot %x, %y, %c : tensor<64x32xbf16> * tensor<32x64xbf16> -> tensor<64x64xf32> loc(#loc)
      }
    }
    %5 = tt.dot %x, %y, %c : tensor<256x256xbf16> * tensor<256x256xbf16> -> tensor<256x256xf32>
    """
    assert source_dots(ttir) == Dots((64, 128, 32), 2.0 * 64 * 32 * (128 + 64), "bf16", True)
    assert source_dots("scf.for {\n}") is None
    assert source_dots("%5 = tt.dot %x, %y, %c : tensor<16x32xf16> * tensor<32x16xf16>").in_loop is False


def test_targets_are_consistent():
    for target in gpu_targets():
        assert gpu_target(target.name) is target
        assert target.processor_shared >= target.shared_bytes
        assert target.flops["bf16"] <= target.flops["f16"]
        assert target.l2_bandwidth > target.memory
        assert target.warp in (32, 64)
    assert len({target.name for target in gpu_targets()}) == 12
    assert gpu_target("H200").memory > gpu_target("sm90").memory
    assert gpu_target("mi300x") is gpu_target("gfx942")


@pytest.mark.parametrize(
    ("name", "nearest"), [("sm_91", "sm_90"), ("gfx943", "gfx942"), ("h10O", "h100"), ("mi300", "mi300x")]
)
def test_unknown_target_names_the_nearest(name, nearest):
    with pytest.raises(OptionError, match=f"did you mean '{nearest}'"):
        gpu_target(name)


@pytest.mark.parametrize(
    ("name", "warps", "registers", "shared", "expected"),
    [
        ("sm_90", 8, 210, 192 << 10, Occupancy(1, 0.125, "registers")),
        ("sm_90", 4, 64, 60 << 10, Occupancy(3, 12 / 64, "shared memory")),
        ("sm_90", 4, 24, 0, Occupancy(16, 1.0, "warps")),
        ("sm_80", 1, 16, 0, Occupancy(32, 0.5, "blocks")),
        ("sm_86", 8, 64, 120 << 10, Occupancy(0, 0.0, "shared memory")),
        ("gfx942", 4, 194, 32 << 10, Occupancy(2, 8 / 32, "registers")),
        ("gfx950", 4, 102, 8 << 10, Occupancy(4, 0.5, "registers")),
    ],
)
def test_occupancy(name, warps, registers, shared, expected):
    assert occupancy(gpu_target(name), warps, registers, shared) == expected


def test_second_time_is_read_from_the_cache_and_damage_is_rebuilt(tmp_path):
    job = Job(SOURCE, "copy", {"x": Pointer("fp32", 4096), "y": Pointer("fp32", 4096), "N": 256})
    first = compile_offline(job, gpu_target("sm_80"), tmp_path)
    (kept,) = (tmp_path / "offline").iterdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moec.gpu.offline._run", lambda folder, timeout: pytest.fail("compiled again"))
        assert compile_offline(job, gpu_target("sm_80"), tmp_path) == first
    for damaged in (b"", b"no archive", kept.read_bytes()[:50], gzip.compress(b"[]"), gzip.compress(b"{}")):
        kept.write_bytes(damaged)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moec.gpu.offline._run", lambda folder, timeout: Refused("compiled again", ""))
            assert compile_offline(job, gpu_target("sm_80"), tmp_path) == Refused("compiled again", "")
