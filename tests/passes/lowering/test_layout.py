"""Results lie in memory as in eager mode, where the user may go on to view them."""

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moec.passes.lowering.layout import axes_in_memory

H, WIDTH, E = 16, 24, 4


class Layer(nn.Module):
    """A loop over stacked experts whose sum begins as zeros like x."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, 2 * WIDTH, H) * H**-0.5)
        self.down = nn.Parameter(torch.randn(E, H, WIDTH) * WIDTH**-0.5)

    def forward(self, x):
        weights, chosen = F.softmax(self.gate(x), -1).topk(2, -1)
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(chosen == e)
            a, b = F.linear(x[token], self.up[e]).chunk(2, -1)
            y.index_add_(0, token, F.linear(F.silu(a) * b, self.down[e]) * weights[token, slot, None])
        return y


class Viewed(Layer):
    def forward(self, x):
        return super().forward(x).t().view(-1)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_view_of_a_transposed_result(dynamic, grad):
    model = Viewed()
    call, report = compiled(model, dynamic)
    for T in (7, 13, 1, 200):
        x = torch.randn(H, T).t()
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-5)
    assert report.sites[0].status == "fused"


def test_strides_are_those_of_eager():
    model, x = Layer(), torch.randn(H, 7).t()
    assert compiled(model)[0](x).stride() == model(x).stride() == (1, 7)


def test_orders_of_axes():
    dense = torch.empty(2, 3, 4, 5)
    assert axes_in_memory(dense) == (0, 1, 2, 3)
    assert axes_in_memory(dense.permute(0, 3, 1, 2)) == (0, 2, 3, 1)
    assert axes_in_memory(torch.empty(3, 1).t()) == (0, 1)  # an axis of size 1 lies anywhere
    assert axes_in_memory(dense[..., ::2]) is None
    assert axes_in_memory(torch.empty(3, 1).expand(3, 4)) is None
    assert axes_in_memory((dense,)) is None


def test_orders_of_axes_with_symbolic_sizes():
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        rows = mode.from_tensor(torch.empty(7, H), static_shapes=False)
        assert axes_in_memory(rows) == (0, 1)
        assert axes_in_memory(rows.t()) == (1, 0)
