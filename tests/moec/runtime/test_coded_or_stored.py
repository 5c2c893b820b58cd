"""Which weights a kernel with a copy in codes reads: the copy, or, for many rows an expert, the parameters."""

import pytest
import torch

from moec.codegen.plan import Sizes
from moec.gpu.target import gpu_target
from moec.ir.dtypes import DTYPES
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.runtime import triton as runtime_triton
from moec.runtime.coded import CodedKernel, coded_kernel
from moec.runtime.triton import TritonKernel

H, F, E, K = 64, 32, 8, 2


@pytest.fixture
def ran(monkeypatch):
    """For each call whether the kernel over codes ran; nothing is launched."""
    found = []
    monkeypatch.setattr(runtime_triton, "gpu_figures", lambda device: gpu_target("sm_90"))
    monkeypatch.setattr(TritonKernel, "_run", lambda self, *_: found.append(isinstance(self, CodedKernel)))
    return found


def made(dtype, weights, stacked, router=False):
    experts = ExpertsSpec(dtype, stacked=stacked)
    spec = KernelSpec(experts, RouterSpec(renormalize=True) if router else None, dtype)
    shapes = [experts.shape(group, H, F) for group in experts.param_groups]
    kind = DTYPES[dtype]
    params = [torch.randn(E, *shape).to(kind) for shape in shapes]
    params = params if stacked else [p for group in params for p in group.unbind(0)]
    kernel = coded_kernel(TritonKernel(spec, torch.device("cuda:0")), weights, params)
    assert isinstance(kernel, CodedKernel)
    return kernel, params


def call(kernel, params, T, router=False):
    x = torch.randn(T, H).to(params[0].dtype)
    if router:
        kernel.moe(x, [torch.randn(E, H).to(x.dtype)], params, K)
    else:
        kernel.experts(x, torch.rand(T, K), torch.zeros(T, K, dtype=torch.int64), params)


@pytest.mark.parametrize(("dtype", "weights", "rows"), [("bf16", "int8", 77), ("f16", "fp8:16", 55)])
@pytest.mark.parametrize("router", [True, False])
@pytest.mark.parametrize("stacked", [True, False])
def test_many_rows_are_multiplied_by_the_parameters_themselves(ran, dtype, weights, rows, router, stacked):
    """An H100 multiplies 147 rows while it reads codes (989 TFLOP/s · 2 B / (4 · 3.35 TB/s)); converting costs more."""
    kernel, params = made(dtype, weights, stacked, router)
    for T in (1, (rows - 1) * E // K, rows * E // K):
        call(kernel, params, T, router)
    assert ran == [True, True, False]
    call(kernel.with_config(kernel.config_for(Sizes(6000, H, F, E, K))), params, 6000, router)
    assert ran[3:] == [True]  # what tuning measures


def test_the_copy_is_there_for_a_graph_that_is_recorded_later(ran, monkeypatch):
    kernel, params = made("bf16", "int8", True)
    copies, encoded = [], CodedKernel._encoded
    monkeypatch.setattr(CodedKernel, "_encoded", lambda self, p: (copies.append(1), encoded(self, p))[1])
    call(kernel, params, 6000)
    assert (ran, copies) == ([False], [1])
    call(kernel, params, 4)
    assert (ran, copies) == ([False, True], [1])


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_copies_of_fp32_weights_are_read_however_many_rows_there_are(ran, weights):
    kernel, params = made("f32", weights, True)
    call(kernel, params, 6000)
    assert ran == [True]


def test_the_interpreter_reads_codes():
    kernel = CodedKernel(TritonKernel(KernelSpec(ExpertsSpec("bf16"), None, "bf16"), torch.device("cpu")), "int8")
    assert not kernel._reads_stored(1 << 30, [torch.zeros(1, 2, 2)] * 2)
