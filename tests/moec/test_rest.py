"""What is not MoE is compiled, and runs where Inductor lacks its compiler."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch._inductor import cpp_builder
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch._inductor.utils import fresh_cache

import moec.runtime.ops  # noqa: F401  # defines the ops
from moec import rest
from moec.target import Target


@pytest.fixture
def no_compiler(monkeypatch):
    def search():
        raise InvalidCxxCompiler

    rest._warn_once.cache_clear()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", search)
    yield
    rest._warn_once.cache_clear()


def graph_of(function, *inputs):
    seen = []
    torch._dynamo.reset()
    torch.compile(function, backend=lambda gm, _: seen.append(gm) or gm.forward)(*inputs)
    return seen[0]


def test_without_inductors_compiler_the_rest_runs_with_one_warning(no_compiler):
    x = torch.randn(3, 4)
    gm = graph_of(lambda x: x.sin() + 1, x)
    with pytest.warns(RuntimeWarning, match="runs in PyTorch, since Inductor cannot run its C\\+\\+ compiler"):
        got = rest.compile_rest(gm, [x], "inductor", None)(x)
    torch.testing.assert_close(got[0], x.sin() + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rest.compile_rest(gm, [x], "inductor", None)


def test_where_kernels_warn_for_want_of_a_compiler_the_rest_is_silent(no_compiler, monkeypatch):
    monkeypatch.setattr(Target, "host", lambda: Target("plain", 4, 6, 2, 3, False, ()))
    inputs = [torch.randn(3, 4), torch.rand(3, 1), torch.zeros(3, 1, dtype=torch.int64)]
    inputs += [torch.randn(2, 6, 4), torch.randn(2, 4, 3)]

    def experts(x, weights, chosen, up, down):
        return torch.ops.moec.experts.default(x, weights, chosen, [up, down], "experts{} -> f32", "eager")

    gm = graph_of(experts, *inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rest.compile_rest(gm, inputs, "inductor", None)


@pytest.fixture
def broken_compiler(monkeypatch):
    """A compiler that tells its version and compiles nothing."""
    rest._warn_once.cache_clear()

    def fails(*args, **kwargs):
        raise CppCompileError(["answers", "-c"], "kernel.cpp:1: fatal error: no such header")

    monkeypatch.setattr(cpp_builder, "run_compile_cmd", fails)
    yield
    rest._warn_once.cache_clear()


@pytest.mark.parametrize("dynamic", [None, True])
def test_what_inductor_cannot_compile_runs_in_pytorch_with_one_warning(broken_compiler, dynamic):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4))
    compiled = torch.compile(model, backend="moec", dynamic=dynamic)
    x = torch.randn(3, 4)
    with fresh_cache(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        y = compiled(x)
        y.square().sum().backward()
        found = [p.grad.clone() for p in model.parameters()]
        compiled(torch.randn(7, 4))
    torch.testing.assert_close(y, model(x))
    said = [str(each.message) for each in said if "moec" in str(each.message)]
    assert len(said) == 1
    assert "since Inductor cannot compile it: CppCompileError: kernel.cpp:1: fatal error: no such header" in said[0]
    model.zero_grad()
    model(x).square().sum().backward()
    for mine, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)
