"""Configurations compiled ahead of measuring: those that calls launch, by processes that may crash or hang."""

import os
import time

import pretended_gpu as gpus
import pytest
import torch

from moec.codegen.plan import Sizes
from moec.codegen.triton_config import GpuConfig
from moec.codegen.triton_schedule import candidates
from moec.gpu.target import gpu_target
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.runtime.triton import load_triton
from moec.tune.ahead import compile_ahead, compile_all
from moec.tune.job import Job

SPEC = KernelSpec(ExpertsSpec("bf16", bias_in=True), None, "bf16")
SIZES = Sizes(64, 128, 64, 8, 2)
JOB = Job(str(SPEC), SIZES, 2, device="cuda:1")


@pytest.fixture(autouse=True)
def guard(tmp_path_factory, tmp_path, monkeypatch):
    gpus.register_guard(tmp_path_factory.mktemp("guard"))
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))
    load_triton.cache_clear()
    yield
    load_triton.cache_clear()


@pytest.mark.parametrize("tokens", [1, 64])
def test_calls_find_what_was_compiled(monkeypatch, tokens):
    gpu = gpus.pretend(monkeypatch, gpus.H100)
    job = Job(JOB.spec, Sizes(tokens, 128, 64, 8, 2), 2, device=JOB.device)
    texts = [str(c) for c in candidates(SPEC, job.sizes, gpu_target("sm_90")) if c.weights == "pointers"]
    compile_all(job, texts)
    compiled = len(gpu.compiled)
    assert compiled
    b = torch.bfloat16
    shapes = [SPEC.experts.shape(group, 128, 64) for group in SPEC.experts.param_groups]
    params = [gpus.tensor(8, *shape, dtype=b) for shape in shapes]
    x, weights = gpus.tensor(tokens, 128, dtype=b), gpus.tensor(tokens, 2)
    experts = gpus.tensor(tokens, 2, dtype=torch.int64)
    plain = load_triton(str(SPEC), torch.device("cuda:1"))
    for text in texts:
        with gpus.MODE:
            plain.with_config(GpuConfig.parse(text)).experts(x, weights, experts, params)
    assert gpu.launches
    assert len(gpu.compiled) == compiled


def test_what_the_compiler_refuses_is_left_to_measuring(monkeypatch):
    gpu = gpus.pretend(monkeypatch, gpus.H100)

    def refuses(name, options):
        if options["num_warps"] == 8:
            raise RuntimeError("PassManager::run failed")

    gpu.refuses = refuses
    few, many = GpuConfig(16, 64, 64), GpuConfig(16, 64, 64, num_warps=8)
    other = KernelSpec(ExpertsSpec("bf16", bias_out=True), None, "bf16")  # whose kernels no other test compiles
    compile_all(Job(str(other), SIZES, 2, device="cuda:1"), [str(many), str(few)])
    assert gpu.compiled.count("down") == 1


def noted(job, texts):
    """What a process does in these tests; the texts are paths of files, or words for what goes wrong."""
    for text in texts:
        if text == "crash":
            os._exit(3)
        if text == "hang":
            time.sleep(600)
        open(text, "w").close()


def test_a_crash_costs_its_own_process(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    files = [str(tmp_path / name) for name in "ab"]
    compile_ahead(JOB, ["crash", files[0], "crash", files[1]], noted)
    assert all(map(os.path.exists, files))


def test_a_hang_ends_with_the_patience(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    start = time.monotonic()
    compile_ahead(JOB, ["hang", "hang"], noted, patience=1.0)
    assert time.monotonic() - start < 300


def test_nothing_is_compiled_ahead_for_the_interpreter():
    compile_ahead(Job(JOB.spec, SIZES, 2, device="cpu"), ["a", "b"], lambda job, texts: pytest.fail("started"))
