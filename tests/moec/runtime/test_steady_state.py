"""Calls after the first: nothing is allocated but the results, in torch, in Python and in the kernels."""

import gc
import subprocess
import sys

import pytest
import torch
from allocated import allocations, bytes_of

import moec.runtime.ops  # noqa: F401  # registers the ops
from moec.codegen.build import build
from moec.codegen.cpp import emit, emit_backward
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.options import Environment
from moec.target import Target

H, WIDTH, E, K = 64, 48, 8, 2
SPEC = KernelSpec(ExpertsSpec(), RouterSpec(renormalize=True))


@pytest.fixture
def tensors():
    params = [torch.randn(E, 2 * WIDTH, H), torch.randn(E, H, WIDTH)]
    return torch.randn(7, H), [torch.randn(E, H)], params


@pytest.mark.parametrize("T", [1, 7])
def test_forward_allocates_its_results(tensors, T):
    x, router, params = tensors

    def call():
        return torch.ops.moec.moe(x[:T], router, params, K, str(SPEC), "cpp")

    call()
    taken, results = allocations(call)
    assert sorted(taken) == bytes_of(results)


def test_backward_allocates_the_gradients(tensors):
    x, _, params = tensors
    weights, experts = torch.rand(7, K), torch.rand(7, E).topk(K).indices
    experts_spec = str(KernelSpec(ExpertsSpec()))
    saved = x.new_empty(0)

    def call():
        needs = [True] * 4
        return torch.ops.moec.experts_backward(x, x, weights, experts, params, saved, experts_spec, "cpp", needs)

    call()
    taken, (dx, dweights, dparams) = allocations(call)
    assert sorted(taken) == bytes_of([dx, dweights, *dparams])


def test_calls_leave_nothing_behind_in_python(tensors):
    x, router, params = tensors

    def calls(count):
        for _ in range(count):
            torch.ops.moec.moe(x, router, params, K, str(SPEC), "cpp")

    calls(300)  # the interpreter keeps what it learns of code that runs often
    gc.collect()
    before = sys.getallocatedblocks()
    calls(300)
    gc.collect()
    assert sys.getallocatedblocks() - before < 100, "blocks that 300 calls left behind"


def test_kernels_have_no_allocator(tmp_path):
    """A library that cannot name malloc or operator new allocates nothing."""
    target = Target.host()
    for source in (emit(SPEC, target), emit_backward(SPEC, target)):
        library = build(source, target, Environment.read().cache_dir)
        try:
            done = subprocess.run(["nm", "-D", "--undefined-only", library._name], capture_output=True, text=True)
        except OSError:
            pytest.skip("no `nm` here to list a library's symbols")
        assert done.returncode == 0, done.stderr
        names = {line.split()[-1].partition("@")[0] for line in done.stdout.splitlines()}
        assert "GOMP_parallel" in names or any(n.startswith("__kmpc") for n in names)
        assert not {n for n in names if "alloc" in n or n.startswith(("_Znw", "_Zna"))}, names
