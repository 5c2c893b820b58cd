"""Memory of gradients: used again once nobody refers to it, gone with its parameter, never handed out twice."""

import gc

import pytest
import torch
from torch import nn

from moec.errors import OptionError
from moec.ir.engine import Engine
from moec.options import Options
from moec.runtime.gradients import GradientMemory, gradient_memory

SIZE = (600, 512)  # 1.2 MB


@pytest.fixture
def memory():
    return GradientMemory()


@pytest.fixture
def parameter():
    return nn.Parameter(torch.zeros(SIZE))


def test_it_is_used_again_when_free_and_not_before(memory, parameter):
    first = memory.take(parameter)
    assert (first.shape, first.dtype, first.is_contiguous()) == (parameter.shape, torch.float32, True)
    at = first.data_ptr()
    second = memory.take(parameter)
    assert second.data_ptr() != at
    del first
    assert memory.take(parameter).data_ptr() == at


@pytest.mark.parametrize("hold", [
    lambda t: t[3:4], lambda t: t.numpy(), lambda t: t.untyped_storage(), lambda t: t.detach(),
    torch.utils.dlpack.to_dlpack,
])  # fmt: skip
def test_whoever_refers_to_it_keeps_it(memory, parameter, hold):
    taken = memory.take(parameter)
    at, held = taken.data_ptr(), hold(taken)
    del taken
    assert memory.take(parameter).data_ptr() != at
    del held
    assert memory.take(parameter).data_ptr() == at


def test_layers_whose_gradients_come_and_go_share_it(memory):
    layers = [nn.Parameter(torch.zeros(SIZE)) for _ in range(4)]
    places = {memory.take(layer).data_ptr() for layer in layers}
    assert len(places) == 1
    assert memory.bytes == 4 * SIZE[0] * SIZE[1]
    narrow = nn.Parameter(torch.zeros(SIZE[0] * 2, SIZE[1], dtype=torch.bfloat16))
    assert memory.take(narrow).data_ptr() in places


def test_it_goes_with_its_parameter(memory):
    parameter, other = (nn.Parameter(torch.zeros(SIZE)) for _ in range(2))
    held = memory.take(parameter)
    memory.take(parameter)
    memory.take(other)  # takes the second of the parameter's
    del parameter
    gc.collect()
    assert memory.bytes == 0
    assert held.fill_(1.0).sum() == held.numel()


def test_gradients_of_many_steps_are_not_kept_after_their_user_lets_go(memory, parameter):
    kept = [memory.take(parameter) for _ in range(9)]
    assert len({t.data_ptr() for t in kept}) == 9
    kept.clear()
    assert memory.bytes == 2 * 4 * SIZE[0] * SIZE[1]
    memory.release()
    assert memory.bytes == 0


def test_small_gradients_and_shared_memory_are_left_alone(memory, parameter):
    small = nn.Parameter(torch.zeros(8, 8))
    assert memory.take(small).shape == (8, 8)
    assert memory.bytes == 0
    taken = memory.take(parameter)
    taken.share_memory_()
    at = taken.data_ptr()
    del taken
    assert memory.take(parameter).data_ptr() != at


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(64, 8, bias=False)
        self.up = nn.Parameter(torch.randn(8, 2 * 96, 64) * 0.1)
        self.down = nn.Parameter(torch.randn(8, 64, 96) * 0.1)

    def forward(self, x):
        weights, chosen = torch.topk(torch.softmax(self.gate(x), -1), 2, dim=-1)
        y = torch.zeros_like(x)
        for e in range(8):
            token, slot = torch.where(chosen == e)
            a, b = nn.functional.linear(x[token], self.up[e]).chunk(2, dim=-1)
            out = nn.functional.linear(nn.functional.silu(a) * b, self.down[e]) * weights[token, slot, None]
            y.index_add_(0, token, out)
        return y


@pytest.mark.parametrize("keep", [True, False])
def test_steps_of_a_compiled_layer(monkeypatch, keep):
    monkeypatch.setattr("moec.runtime.gradients._LEAST", 1)
    gradient_memory().release()
    layer, x = Layer(), torch.randn(20, 64)
    compiled = torch.compile(layer, backend="moec", options={"rest": "eager", "keep_gradients": keep})
    layer(x).pow(2).sum().backward()
    want = [p.grad.clone() for p in (layer.up, layer.down)]
    places = []
    for _ in range(3):
        layer.zero_grad()
        compiled(x).pow(2).sum().backward()
        places.append(layer.up.grad.data_ptr())
    assert (gradient_memory().bytes == sum(4 * w.numel() for w in want)) is keep
    assert not keep or len(set(places)) == 1
    compiled(x).pow(2).sum().backward()  # added to what is there
    for got, one in zip((layer.up.grad, layer.down.grad), want, strict=True):
        assert torch.allclose(got, 2 * one, atol=1e-4)
    del layer, compiled, got
    torch._dynamo.reset()
    gc.collect()
    assert gradient_memory().bytes == 0


def test_the_option_is_a_word_of_the_engine():
    assert str(Options(keep_gradients=False).engine(True)) == "auto fresh"
    assert str(Options(keep_gradients=False).engine(False)) == "auto"
    for text in ("auto", "auto fresh", "cpp race fresh weights=int8:128"):
        assert str(Engine.parse(text)) == text
    with pytest.raises(OptionError, match="then `race`, `fresh`"):
        Engine.parse("auto fresh fresh")
