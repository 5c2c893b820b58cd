"""Triton kernels in the interpreter, which must be on before Triton is imported, hence a process of its own.

`-m gpu` runs the same cases on a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moec.errors import CodegenError
from moec.runtime_triton import load_triton
from moec.spec import ExpertsSpec, KernelSpec

HERE = Path(__file__).parent


def interpreted(name, *arguments):
    run_cases(name, {"TRITON_INTERPRET": "1"}, *arguments)


def run_cases(name, changes, *arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    command = [sys.executable, "-m", "pytest", str(HERE / name), "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=HERE.parent.parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_kernels_equal_the_twin():
    interpreted("triton_cases.py", "-m", "not slow", "-o", "addopts=--import-mode=importlib")


def test_kernels_over_codes_equal_the_twin_on_what_they_stand_for():
    interpreted("triton_codes_cases.py", "-m", "not slow", "-o", "addopts=--import-mode=importlib")


def test_layers_with_a_capacity_equal_eager():
    interpreted("triton_capacity_cases.py", "-o", "addopts=--import-mode=importlib")


def test_launches_and_bytes_are_those_of_the_trace():
    pytest.importorskip("transformers")
    interpreted("triton_trace_cases.py", "-m", "not slow", "-o", "addopts=--import-mode=importlib")


def test_models_equal_eager():
    pytest.importorskip("transformers")
    interpreted("triton_models.py", "-m", "not slow", "-o", "addopts=--import-mode=importlib")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triton_cases.py", "triton_codes_cases.py", "triton_models.py"])
def test_the_full_cross_product(name):
    interpreted(name, "-m", "slow", "-o", "addopts=--import-mode=importlib")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["triton_cases.py", "triton_codes_cases.py", "triton_capacity_cases.py", "triton_models.py"]
)
def test_on_a_gpu(name):
    assert torch.cuda.is_available(), "torch sees no GPU"
    run_cases(name, {"MOEC_TEST_DEVICE": "cuda"}, "-m", "not slow", "-o", "addopts=--import-mode=importlib")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
def test_without_the_interpreter_cpu_tensors_are_an_error_that_says_so():
    with pytest.raises(CodegenError, match="TRITON_INTERPRET=1"):
        load_triton(str(KernelSpec(ExpertsSpec())), torch.device("cpu"))
