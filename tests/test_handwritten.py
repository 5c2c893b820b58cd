"""MoE layers as people write them: loops over modules, masks, in-place sums; outputs, choices and all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled as reported
from torch import nn

QUICK = {"rest": "eager"}
H, WIDTH, E, K = 16, 24, 4, 2


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Linear(H, WIDTH, bias=False), nn.Linear(H, WIDTH, bias=False)
        self.w2 = nn.Linear(WIDTH, H, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Plain(nn.Module):
    """Two layers with biases and GELU."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, WIDTH), nn.Linear(WIDTH, H)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    def __init__(self, expert=Expert, experts=E, k=K):
        super().__init__()
        self.gate = nn.Linear(H, experts, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(experts))
        self.num_experts, self.k = experts, k

    def route(self, x):
        weights, chosen = torch.topk(F.softmax(self.gate(x), dim=-1, dtype=torch.float), self.k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(x.dtype), chosen


class WhereLoop(Layer):
    """range(E), where on a permuted one-hot mask, index_add_."""

    def forward(self, x):
        shape = x.shape
        x = x.view(-1, H)
        weights, chosen = self.route(x)
        y = torch.zeros((x.shape[0], H), dtype=x.dtype, device=x.device)
        mask = F.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in range(self.num_experts):
            expert = self.experts[expert_idx]
            slot, token = torch.where(mask[expert_idx])
            current = x[None, token].reshape(-1, H)
            current = expert(current) * weights[token, slot, None]
            y.index_add_(0, token, current.to(x.dtype))
        return y.reshape(shape)


class MaskLoop(Layer):
    """Boolean masks and weights summed over slots."""

    def forward(self, x):
        x = x.reshape(-1, H)
        weights, chosen = self.route(x)
        y = torch.zeros_like(x)
        for e in range(self.num_experts):
            mask = (chosen == e).any(-1)
            if not mask.any():
                continue
            weight = (weights * (chosen == e)).sum(-1)
            y[mask] += weight[mask].unsqueeze(-1) * self.experts[e](x[mask])
        return y


class EnumerateLoop(Layer):
    """enumerate(experts) with an in-place add on indexed rows."""

    def forward(self, x):
        x = x.reshape(-1, H)
        weights, chosen = self.route(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            if token.numel() == 0:
                continue
            y[token] += weights[token, slot, None] * expert(x[token])
        return y


class HitLoop(Layer):
    """Only experts that are hit, by nonzero."""

    def forward(self, x):
        x = x.reshape(-1, H)
        weights, chosen = self.route(x)
        y = torch.zeros_like(x)
        mask = F.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in hit:
            e = e[0]
            slot, token = torch.where(mask[e])
            y.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return y


class KeyedLoop(Layer):
    """Experts in a ModuleDict, by a key that is text; the item indexes as a list of one."""

    def __init__(self, expert=Expert, experts=E, k=K):
        super().__init__(expert, experts, k)
        self.experts = nn.ModuleDict({f"expert_{i}": expert() for i in range(experts)})

    def forward(self, x):
        x = x.reshape(-1, H)
        weights, chosen = self.route(x)
        y = torch.zeros_like(x)
        mask = F.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[e].squeeze(0))
            current = self.experts[f"expert_{e[0]}"](x[None, token].reshape(-1, H))
            y.index_add_(0, token, current * weights[token, slot, None])
        return y


LOOPS = (WhereLoop, MaskLoop, EnumerateLoop, HitLoop, KeyedLoop)


def make(kind, **kwargs):
    torch.manual_seed(0)
    return kind(**kwargs)


def compiled(layer):
    torch._dynamo.reset()
    return torch.compile(layer, backend="moec", options=QUICK)


def gradients(run, layer, x):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    run(x).square().sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


def assert_close(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            assert float((g - w).norm()) <= tolerance * max(float(w.norm()), 1e-6)


@pytest.mark.parametrize("kind", LOOPS)
def test_loops_are_fused_in_one_graph(kind):
    layer, x = make(kind), torch.randn(13, H)
    run, report = reported(layer)
    with torch.no_grad():
        assert_close([run(x)], [layer(x)], 1e-5)
    assert report.graphs == 1
    assert [s.status for s in report.sites] == ["fused"], report
    assert report.sites[0].num_experts == E
    assert report.sites[0].top_k == K


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("expert", [Expert, Plain])
def test_gradients_of_input_router_and_every_expert(kind, expert):
    layer, x = make(kind, expert=expert), torch.randn(13, H)
    assert_close(gradients(compiled(layer), layer, x), gradients(layer, layer, x), 1e-4)


def test_gradients_through_inductor():
    layer, x = make(WhereLoop), torch.randn(13, H)
    torch._dynamo.reset()
    run = torch.compile(layer, backend="moec")
    assert_close(gradients(run, layer, x), gradients(layer, layer, x), 1e-4)


@pytest.mark.parametrize("kind", LOOPS)
def test_any_number_of_tokens(kind):
    layer = make(kind)
    run, _ = reported(layer, dynamic=True)
    with torch.no_grad():
        for tokens in (7, 200, 1, 0):
            x = torch.randn(tokens, H)
            got = run(x)
            assert got.shape == layer(x).shape
            assert_close([got], [layer(x)], 1e-5)


@pytest.mark.parametrize("k", [1, E])
def test_one_and_all_experts(k):
    layer, x = make(WhereLoop, k=k), torch.randn(13, H)
    with torch.no_grad():
        assert_close([compiled(layer)(x)], [layer(x)], 1e-5)


def test_all_tokens_to_one_expert_and_idle_experts():
    layer, x = make(WhereLoop, k=1), torch.randn(64, H)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[2] = 1.0
    x = x.abs()
    with torch.no_grad():
        assert_close([compiled(layer)(x)], [layer(x)], 1e-5)
    got, want = gradients(compiled(layer), layer, x), gradients(layer, layer, x)
    assert_close(got, [torch.zeros_like(g) if w is None else w for g, w in zip(got, want, strict=True)], 1e-4)


def test_ties_choose_what_eager_chooses():
    layer, x = make(WhereLoop), torch.randn(64, H)
    with torch.no_grad():
        layer.gate.weight.zero_()  # every expert has the same score
        assert_close([compiled(layer)(x)], [layer(x)], 1e-5)


def test_strided_input():
    layer, x = make(MaskLoop), torch.randn(H, 26).t()[::2]
    with torch.no_grad():
        assert_close([compiled(layer)(x)], [layer(x)], 1e-5)


def test_two_compiles_over_all_token_counts():
    layer, count = make(WhereLoop), []
    run, report = reported(layer)
    with torch.no_grad():
        for tokens in (1, 2, 7, 64, 513, 4096):
            x = torch.randn(tokens, H)
            assert_close([run(x)], [layer(x)], 1e-5)
            count.append(report.graphs)
    assert count[-1] <= 2, count


def test_state_dict_and_parameters_stay_the_users():
    layer = make(WhereLoop)
    names, pointers = list(layer.state_dict()), [p.data_ptr() for p in layer.parameters()]
    with torch.no_grad():
        compiled(layer)(torch.randn(7, H))
    assert list(layer.state_dict()) == names
    assert [p.data_ptr() for p in layer.parameters()] == pointers


def test_an_optimizer_step_is_seen():
    layer, x = make(WhereLoop), torch.randn(13, H)
    run = compiled(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        run(x).square().sum().backward()
        optimizer.step()
    assert_close([run(x)], [layer(x)], 1e-5)


def test_weights_computed_under_no_grad_too_keep_their_gradient():
    class Logged(WhereLoop):
        def forward(self, x):
            with torch.no_grad():
                self.load = self.route(x)[0].sum()
            return super().forward(x)

    layer, x = make(Logged), torch.randn(13, H)
    assert_close(gradients(compiled(layer), layer, x), gradients(layer, layer, x), 1e-4)
