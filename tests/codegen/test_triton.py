"""Triton kernels in the interpreter, which must be on before Triton is imported, hence a process of its own.

`-m gpu` runs the same cases on a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moec.errors import OptionError
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.runtime.triton import load_triton

HERE = Path(__file__).parent
KERNELS = ("triton_cases.py", "triton_gradient_cases.py", "triton_router_cases.py")


def check_interpreted(*names, marks="not slow"):
    run_cases(names, {"TRITON_INTERPRET": "1"}, marks)


def run_cases(names, changes, marks="not slow"):
    """The tests of some files in one process, of which each must have run."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    how = ["-p", "no:cacheprovider", "-m", marks, "-o", "addopts=--import-mode=importlib", "-rA"]
    command = [sys.executable, "-m", "pytest", *(str(HERE / name) for name in names), *how]
    done = subprocess.run(command, cwd=HERE.parent.parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    for name in names:
        assert f"PASSED tests/codegen/{name}::" in done.stdout


def test_kernels_equal_the_twin():
    check_interpreted(*KERNELS)


def test_codes_capacities_and_traces():
    """Kernels over codes equal the twin on what they stand for; layers with a capacity equal eager; launches and bytes
    are those of the trace."""
    pytest.importorskip("transformers")
    check_interpreted("triton_codes_cases.py", "triton_capacity_cases.py", "triton_trace_cases.py")


def test_models_equal_eager():
    pytest.importorskip("transformers")
    check_interpreted("triton_models.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KERNELS, "triton_codes_cases.py", "triton_models.py"])
def test_the_full_cross_product(name):
    check_interpreted(name, marks="slow")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*KERNELS, "triton_codes_cases.py", "triton_capacity_cases.py", "triton_models.py"])
def test_on_a_gpu(name):
    assert torch.cuda.is_available(), "torch sees no GPU"
    run_cases([name], {"MOEC_TEST_DEVICE": "cuda"})


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
def test_without_the_interpreter_cpu_tensors_are_an_error_that_says_so():
    with pytest.raises(OptionError, match="TRITON_INTERPRET=1"):
        load_triton(str(KernelSpec(ExpertsSpec())), torch.device("cpu"))
