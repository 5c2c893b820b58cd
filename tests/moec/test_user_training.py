"""What people do with a compiled model while they train or change it: outputs and every gradient as in eager mode."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moec
from moec.errors import MoecError

H, WIDTH, E = 16, 24, 4
QUICK = {"rest": "eager"}


class Layer(nn.Module):
    """A loop over stacked experts; `outputs` of the router may be more or fewer than there are experts."""

    def __init__(self, outputs=E, experts=E):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(H, outputs, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 2 * WIDTH, H) * H**-0.5)
        self.down = nn.Parameter(torch.randn(experts, H, WIDTH) * WIDTH**-0.5)

    def forward(self, x):
        weights, chosen = F.softmax(self.gate(x), -1).topk(2, -1)
        y = torch.zeros_like(x)
        for e in range(self.up.shape[0]):
            token, slot = torch.where(chosen == e)
            a, b = F.linear(x[token], self.up[e]).chunk(2, -1)
            y.index_add_(0, token, F.linear(F.silu(a) * b, self.down[e]) * weights[token, slot, None])
        return y


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", ["up down", "up", "gate", "x", ""])
def test_only_some_parameters_are_trained(trained):
    model = Layer()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] in trained.split())
    plain = copy.deepcopy(model)
    x = torch.randn(7, H, requires_grad=trained == "x")
    y, wanted = torch.compile(model, backend="moec", options=QUICK)(x), plain(x)
    close(y, wanted)
    assert y.requires_grad == wanted.requires_grad == bool(trained)
    if trained == "x":
        close(torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(wanted.square().sum(), x))
    elif trained:
        y.square().sum().backward()
        wanted.square().sum().backward()
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert (mine.grad is None) == (other.grad is None)
            if mine.grad is not None:
                close(mine.grad, other.grad)


@pytest.mark.parametrize("outputs", [E - 1, E + 2])
@pytest.mark.parametrize("grad", [False, True])
def test_a_router_with_other_outputs_than_there_are_experts(outputs, grad):
    model, x = Layer(outputs), torch.randn(40, H)
    with torch.set_grad_enabled(grad):
        assert moec.explain(model, x, moec_options=QUICK).sites[0].status == "fused"
        close(torch.compile(model, backend="moec", options=QUICK)(x), model(x))


def test_a_gradient_of_gradients_is_refused_and_not_wrong():
    x = torch.randn(7, H, requires_grad=True)
    y = torch.compile(Layer(), backend="moec", options=QUICK)(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(MoecError, match="gradient of experts' gradients is not computed"):
        gradient.square().sum().backward()


class Dense(Layer):
    """Every expert on every token, times a gate."""

    def forward(self, x):
        weights, chosen = F.softmax(self.gate(x), -1).topk(2, -1)
        gates = x.new_zeros(x.shape[0], self.up.shape[0]).scatter(1, chosen, weights)
        a, b = torch.einsum("th,ewh->tew", x, self.up).chunk(2, -1)
        return torch.einsum("tew,ehw,te->th", F.silu(a) * b, self.down, gates)


@pytest.mark.parametrize("kind", [Layer, Dense])
def test_inside_of_a_transform_of_torch_func_the_model_stays_as_it_is(kind):
    model, x = kind(), torch.randn(7, H)
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def gradients(given):
        return torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(given)

    found = torch.compile(gradients, backend="moec", options=QUICK)(parameters)
    close(found, gradients(parameters))


class Scaled(nn.Module):
    """An expert with a number and a function of its own."""

    def __init__(self):
        super().__init__()
        self.scale, self.phi = 1.0, torch.relu
        self.up, self.down = nn.Linear(H, WIDTH), nn.Linear(WIDTH, H)

    def forward(self, x):
        return self.down(self.phi(self.up(x))) * self.scale


class Modules(nn.Module):
    """A loop over experts that are modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Linear(H, E), nn.ModuleList(Scaled() for _ in range(E))

    def forward(self, x):
        weights, chosen = F.softmax(self.gate(x), -1).topk(2, -1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y


def another_module(experts, i):
    experts[i] = nn.Sequential(nn.Linear(H, H), nn.Tanh())


def another_child(experts, i):
    experts[i].up = nn.Sequential(nn.Linear(H, WIDTH), nn.Tanh())


def another_number(experts, i):
    experts[i].scale = 3.0


def another_function(experts, i):
    experts[i].phi = torch.tanh


def one_less(experts, i):
    del experts[i].down.bias
    experts[i].down.bias = None


@pytest.mark.parametrize("change", [another_module, another_child, another_number, another_function, one_less])
def test_an_expert_that_becomes_another_after_the_first_call(change):
    model, x = Modules(), torch.randn(40, H)
    call = torch.compile(model, backend="moec", options=QUICK)
    with torch.no_grad():
        close(call(x), model(x))
        change(model.experts, 2)
        close(call(x), model(x))


def test_a_hook_that_is_added_to_an_expert_later_is_seen_where_torch_is_asked_to():
    model, x = Modules(), torch.randn(40, H)
    call = torch.compile(model, backend="moec", options=QUICK)
    with torch.no_grad(), torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        close(call(x), model(x))
        model.experts[2].register_forward_hook(lambda module, args, out: 2 * out)
        close(call(x), model(x))
