"""The kernel's top-k against torch.topk: the same indices among equals, NaN and infinities, for many E and k."""

import ctypes

import pytest
import torch

from moec.codegen.build import build
from moec.options import Environment
from moec.target import Target

SOURCE = """
#define MOEC_LANES 4
#include "router.hpp"
extern "C" __attribute__((visibility("default")))
void top(const float* x, int64_t n, int64_t k, int64_t sorted, moec::Scored* queue, int64_t* out) {
  for (int64_t i = 0; i < n; i++) queue[i] = {x[i], i};
  moec::top_k(queue, n, k, sorted);
  for (int64_t i = 0; i < k; i++) out[i] = queue[i].second;
}
"""


@pytest.fixture(scope="module")
def top():
    function = build(SOURCE, Target.host().emulating("plain"), Environment.read().cache_dir).top
    function.restype = None

    def call(x, k, sorted):
        queue, out = torch.empty(len(x) * 2, dtype=torch.int64), torch.empty(k, dtype=torch.int64)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (queue, out))
        words = (ctypes.c_int64(n) for n in (len(x), k, int(sorted)))
        function(ctypes.c_void_p(x.data_ptr()), *words, *pointers)
        return out

    return call


@pytest.mark.parametrize("E", [1, 2, 5, 8, 16, 60, 64, 128, 130, 256, 512])
def test_equal_to_torch_topk(top, E):
    g = torch.Generator().manual_seed(E)
    ks = sorted({1, 2, 3, 4, 6, 8, 10, E // 64, E - 1, E} & set(range(1, E + 1)))
    for levels in (1, 2, 5, 1000):
        rows = torch.randint(0, levels, (12, E), generator=g).float()
        rows[3, ::3] = float("nan")
        rows[4, ::2] = float("inf")
        rows[5] = float("-inf")
        for k in ks:
            for is_sorted in (True, False):
                for row in rows:
                    assert torch.equal(top(row, k, is_sorted), torch.topk(row, k, sorted=is_sorted).indices)


def test_bf16_scores(top):
    rows = torch.randn(50, 128).bfloat16()
    for row in rows:
        assert torch.equal(top(row.float(), 8, True), torch.topk(row, 8).indices)
