"""The vector functions of pointwise.hpp against float64, and the conversions of 16-bit floats, bit for bit."""

import ctypes

import pytest
import torch

from moec.codegen.build import build
from moec.ir.expr import POINTWISE
from moec.options import Environment
from moec.target import Target

NAMES = tuple(name for name, function in POINTWISE.items() if function.arity == 1)
BINARY = tuple(name for name, function in POINTWISE.items() if function.arity == 2)
SOURCE = """
#include "pointwise.hpp"
using namespace moec;
#define EXPORT extern "C" __attribute__((visibility("default")))
"""
UNARY_CPP = """EXPORT void f_{name}(const float* x, float* y, int64_t n) {{
  for (int64_t i = 0; i < n; i += L) store(y + i, {name}(load(x + i)));
}}
"""
BINARY_CPP = """EXPORT void f_{name}(const float* x, const float* z, float* y, int64_t n) {{
  for (int64_t i = 0; i < n; i += L) store(y + i, {name}(load(x + i), load(z + i)));
}}
"""
CONVERT_CPP = """EXPORT void widen_{t}(const {t}* x, float* y, float* one, int64_t n) {{
  for (int64_t i = 0; i < n; i += L) store(y + i, load(x + i));
  for (int64_t i = 0; i < n; i++) one[i] = value(x[i]);
}}
EXPORT void narrow_{t}(const float* x, {t}* y, {t}* one, int64_t n) {{
  for (int64_t i = 0; i < n; i += L) store(y + i, load(x + i));
  for (int64_t i = 0; i < n; i++) one[i] = narrow<{t}>(x[i]);
}}
"""


@pytest.fixture(scope="module", params=["host", "plain"])
def library(request):
    target = Target.host() if request.param == "host" else Target.host().emulating("plain")
    source = f"#define MOEC_LANES {target.lanes}\n{SOURCE}"
    source += "".join(UNARY_CPP.format(name=n) for n in NAMES) + "".join(BINARY_CPP.format(name=n) for n in BINARY)
    source += "".join(CONVERT_CPP.format(t=t) for t in ("bf16", "f16"))
    return build(source, target, Environment.read().cache_dir)


def call(function, *tensors):
    function.restype = None
    function(*(ctypes.c_void_p(t.data_ptr()) for t in tensors), ctypes.c_int64(tensors[0].numel()))


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("round_")])
def test_roundings_are_exact(library, name):
    x = torch.cat([torch.linspace(-30, 30, 40000), torch.logspace(-40, 4.8, 8000), torch.arange(64) / 512 + 1])
    y = torch.empty_like(x)
    call(getattr(library, f"f_{name}"), x, y)
    assert torch.equal(y, POINTWISE[name].eager(x))


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("round_")])
def test_within_a_few_units_of_float64(library, name):
    positive = name in ("log", "sqrt")
    x = torch.cat([torch.linspace(-30, 30, 40000), torch.linspace(-1.2, 1.2, 40000), torch.logspace(-40, -1, 8000)])
    x = x.abs() + 1e-30 if positive else x.clamp(min=-0.999) if name == "log1p" else x
    y = torch.empty_like(x)
    call(getattr(library, f"f_{name}"), x, y)
    want = POINTWISE[name].eager(x.double())
    # gelu far below zero is x times a difference of nearly equal numbers, in torch too: the error is relative to x.
    scale = (x.double() if name.startswith("gelu") else want).abs().clamp(min=1e-36)
    assert float(((y.double() - want).abs() / scale).max()) < 4e-7


@pytest.mark.parametrize("name", NAMES)
def test_special_values_as_in_torch(library, name):
    inf = float("inf")
    numbers = (0.0, -0.0, 1e30, -1e30, 200.0, -200.0, 1e-30, 88.0, -88.0, 20.0, 1.0, -1.0, 0.5)
    x = torch.tensor([float("nan"), inf, -inf, *numbers])
    y = torch.empty_like(x)
    call(getattr(library, f"f_{name}"), x, y)
    want, exact = POINTWISE[name].eager(x), POINTWISE[name].eager(x.double()).float()
    # torch's own gelu of inf is NaN in fp32 where vectors have 16 numbers.
    want = torch.where(want.isnan(), exact, want)
    assert torch.allclose(y, want, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("name", BINARY)
def test_two_arguments_as_in_torch(library, name):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.0, -2.5, 3.0, 7.0])
    x, z = values.repeat_interleave(8), values.repeat(8)
    y = torch.empty_like(x)
    call(getattr(library, f"f_{name}"), x, z, y)
    want = POINTWISE[name].eager(x, z)
    if name in ("clamp_min", "clamp_max"):  # a bound is a number
        keep = ~z.isnan()
        y, want = y[keep], want[keep]
    assert torch.equal(y.nan_to_num(123.0), want.nan_to_num(123.0))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_bit_for_bit(library, name, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    y, one = torch.empty(len(x)), torch.empty(len(x))
    widen = getattr(library, f"widen_{name}")
    widen.restype = None
    widen(*(ctypes.c_void_p(t.data_ptr()) for t in (x, y, one)), ctypes.c_int64(len(x)))
    assert torch.equal(y.nan_to_num(9e9), x.float().nan_to_num(9e9))
    assert torch.equal(one.nan_to_num(9e9), x.float().nan_to_num(9e9))
    exact = y.nan_to_num(0)
    wide = torch.cat([*(torch.randn(4096) * 10.0**e for e in range(-9, 6)), exact, exact * 1.0004883])
    narrow, single = torch.empty(len(wide), dtype=dtype), torch.empty(len(wide), dtype=dtype)
    call(getattr(library, f"narrow_{name}"), wide, narrow, single)
    assert torch.equal(narrow, wide.to(dtype))
    assert torch.equal(single, wide.to(dtype))
