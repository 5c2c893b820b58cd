"""How libraries write MoE layers beyond the usual loops, each in its own few lines: one graph, eager's answer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled
from torch import nn

import moec

H, WIDTH, E, K = 16, 24, 4, 2
QUICK = {"rest": "eager"}


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, WIDTH), nn.Linear(WIDTH, H)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.down(self.drop(F.relu(self.up(x))))


class OwnDict(nn.ModuleDict):
    """A dictionary that is the layer itself, and holds something else than experts."""

    def __init__(self):
        super().__init__()
        for i in range(E):
            self[f"expert_{i}"] = Mlp()
        self.drop = nn.Dropout(0.0)

    def forward(self, x, mask, weights):
        y = torch.zeros_like(x)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[e].squeeze(0))
            rows = x[None, token].reshape(-1, x.shape[-1])
            y.index_add_(0, token, self[f"expert_{e[0]}"](rows) * weights[token, slot, None])
        return y


class Capacity(nn.Module):
    """Switch: one expert a token, what overflows an expert of a sequence is dropped; the router keeps its dtype."""

    def __init__(self, capacity=2):
        super().__init__()
        self.router, self.experts, self.capacity = nn.Linear(H, E), OwnDict(), capacity

    def forward(self, x):
        x = x.unflatten(0, (x.shape[0] // 4, 4))
        self.router = self.router.to(torch.float32)
        scores = F.softmax(self.router(x), dim=-1)
        mask = F.one_hot(scores.argmax(-1), num_classes=E)
        mask = mask * (torch.cumsum(mask, dim=-2) <= self.capacity)
        weights = scores.max(-1).values.view(-1, 1)
        return self.experts(x.view(-1, H), mask.view(-1, 1, E).permute(2, 1, 0), weights)


class AboveCapacity(Capacity):
    """The tokens that overflow instead."""

    def forward(self, x):
        x = x.unflatten(0, (x.shape[0] // 4, 4))
        scores = F.softmax(self.router(x), dim=-1)
        mask = F.one_hot(scores.argmax(-1), num_classes=E)
        mask = mask * (torch.cumsum(mask, dim=-2) > self.capacity)
        weights = scores.max(-1).values.view(-1, 1)
        return self.experts(x.view(-1, H), mask.view(-1, 1, E).permute(2, 1, 0), weights)


class Stacked(nn.Module):
    def __init__(self, experts=E):
        super().__init__()
        self.router = nn.Linear(H, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * WIDTH, H) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, H, WIDTH) * 0.2)

    def route(self, x):
        return torch.topk(torch.sigmoid(self.router(x)), K, dim=-1)


class NormAfter(Stacked):
    """A norm after each expert."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(H)

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        mask = F.one_hot(idx, num_classes=E + 1).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            e = e[0]
            if e == E:
                continue
            slot, token = torch.where(mask[e])
            gate, up = F.linear(x[token], self.gate_up[e]).chunk(2, dim=-1)
            out = self.norm(F.linear(F.silu(gate) * up, self.down[e])) * w[token, slot, None]
            out *= 0.5
            y.index_add_(0, token, out.to(x.dtype))
        return y


class ZeroExperts(Stacked):
    """The last experts compute nothing: what they are given is what they give."""

    zero = 2

    def __init__(self):
        super().__init__(E + self.zero)
        self.down = nn.Parameter(torch.empty(E, H, WIDTH))

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        mask = F.one_hot(idx, num_classes=E + self.zero).permute(2, 1, 0)
        for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero(as_tuple=False):
            e = int(hit.item())
            slot, token = torch.where(mask[e].squeeze(0))
            if token.numel() == 0:
                continue
            rows = x[token]
            if e >= E or self.gate_up is None:
                out = rows
            else:
                gate, up = F.linear(rows, self.gate_up[e]).chunk(2, dim=-1)
                out = F.linear(F.silu(gate) * up, self.down[e])
            y.index_add_(0, token, (out * w[token, slot, None]).to(x.dtype))
        return y


class Runs(nn.Module):
    """One matrix an expert, over rows in expert order that are cut by the sizes that the caller gives."""

    experts_run = E

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, outputs, inputs))

    def forward(self, rows, sizes):
        pieces = rows.split(sizes, dim=0)
        outs = []
        for i in range(self.experts_run):
            outs.append(F.linear(pieces[i], self.weight[i]))
        return torch.cat(outs, dim=0)


class Gate(nn.Module):
    """A router that counts on the host and hands the counts over."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(H, E, bias=False)

    def forward(self, x):
        top, idx = self.layer(x).topk(K, dim=1)
        w = torch.softmax(top, dim=1)
        counts = torch.zeros([x.shape[0], E], dtype=w.dtype).scatter(1, idx, 1).long().sum(0)
        counts = counts.tolist()
        _, order = idx.flatten().sort(0)
        return order.div(K, rounding_mode="trunc"), w.flatten()[order], counts


class CountsHandedOver(nn.Module):
    """Counts by one module, rows cut by them in another, twice."""

    runs = Runs

    def __init__(self):
        super().__init__()
        self.router, self.up, self.down = Gate(), self.runs(H, 2 * WIDTH), self.runs(WIDTH, H)
        self.bias = nn.Parameter(torch.zeros(H))

    def forward(self, x):
        token, w, counts = self.router(x)
        a, b = self.up(x[token], counts).chunk(2, dim=-1)
        out = self.down(F.silu(a) * b, counts) * w[:, None]
        return torch.zeros_like(x).index_add(0, token, out) + self.bias


class LastMissing(Runs):
    """All experts but the last."""

    experts_run = E - 1


class CountsRead(CountsHandedOver):
    """The counts are read by the caller too."""

    def forward(self, x):
        _, _, counts = self.router(x)
        return super().forward(x) * float(counts[0])


def spread(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return model


def check(make, tokens, status, train=True, options=QUICK):
    model = spread(make())
    x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(tokens), requires_grad=train)
    run, report = compiled(model, **options)
    with torch.set_grad_enabled(train):
        want, got = model(x), run(x)
    assert report.graphs == 1
    if tokens:  # without tokens nothing has to be found
        assert [s.status for s in report.sites] == list(status), report
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if not train:
        return
    loss = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    named = [("x", x), *model.named_parameters()]
    wanted = torch.autograd.grad((want * loss).sum(), [v for _, v in named], allow_unused=True)
    given = torch.autograd.grad((got * loss).sum(), [v for _, v in named], allow_unused=True)
    for (name, value), a, b in zip(named, given, wanted, strict=True):
        zero = torch.zeros_like(value)
        torch.testing.assert_close(
            zero if a is None else a,
            zero if b is None else b,
            rtol=1e-3,
            atol=1e-4,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize(
    ("make", "status"),
    [(Capacity, ["fused"]), (NormAfter, ["fused"]), (CountsHandedOver, ["fused"]), (ZeroExperts, ["fused"])],
    ids=["capacity", "norm_after", "counts_handed_over", "zero_experts"],
)
@pytest.mark.parametrize(("tokens", "train"), [(28, False), (12, True), (0, False)])
def test_found_and_equal(make, status, tokens, train):
    check(make, tokens, status, train=train)


def test_tokens_above_capacity_are_equal():
    model, x = spread(AboveCapacity()), torch.randn(28, H)
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, backend="moec", options=QUICK)(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def test_counts_that_are_read_elsewhere_move_to_the_host_as_written():
    model, x = spread(CountsRead()), torch.randn(9, H)
    torch._dynamo.reset()
    with torch.no_grad():
        report = moec.explain(model, x, moec_options=QUICK)
        got = torch.compile(model, backend="moec", options=QUICK)(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
    assert any("read elsewhere" in str(r) for r in report.not_rolled), report.not_rolled


class SomeSkipped(ZeroExperts):
    """The skip comes after the experts' matrices are read: the others still count for nothing."""

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for e in range(E + self.zero):
            token, slot = torch.where(idx == e)
            gate_up, down = self.gate_up[e], self.down[min(e, E - 1) if isinstance(e, int) else e]
            if e > E - 2:
                continue
            gate, up = F.linear(x[token], gate_up).chunk(2, dim=-1)
            y.index_add_(0, token, F.linear(F.silu(gate) * up, down) * w[token, slot, None])
        return y


class OverwritesByBranch(Stacked):
    """Branches that overwrite rows: which expert comes last matters, so the loop is not parted."""

    def forward(self, x):
        _, idx = self.route(x)
        y = torch.zeros_like(x)
        for e in range(E):
            token, _ = torch.where(idx == e)
            gate, up = F.linear(x[token], self.gate_up[e]).chunk(2, dim=-1)
            if e < 2:
                y[token] = F.linear(F.silu(gate) * up, self.down[e])
            else:
                y[token] = F.linear(torch.relu(gate) * up, self.down[e])
        return y


@pytest.mark.parametrize("make", [SomeSkipped, OverwritesByBranch])
def test_near_misses_are_equal(make):
    model, x = spread(make()), torch.randn(13, H)
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, backend="moec", options=QUICK)(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
