"""What moec does not fuse runs as it was, and says why; bad input gets one clear line."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moec

QUICK = {"rest": "eager"}
H, E = 16, 4


class NormExpert(nn.Module):
    """An expert that is not an MLP: its hidden state is normalised."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(H, 24), nn.LayerNorm(24), nn.Linear(24, H)

    def forward(self, x):
        return self.down(F.silu(self.norm(self.up(x))))


class Loop(nn.Module):
    def __init__(self, expert):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(E))

    def forward(self, x):
        weights, chosen = torch.topk(F.softmax(self.gate(x), dim=-1), 2, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            y.index_add_(0, token, (expert(x[token]) * weights[token, slot, None]).to(y.dtype))
        return y


def mlp():
    return nn.Sequential(nn.Linear(H, 24), nn.ReLU(), nn.Linear(24, H))


def run(model, *args):
    torch._dynamo.reset()
    return torch.compile(model, backend="moec", options=QUICK)(*args)


@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_an_expert_that_is_no_mlp_runs_its_own_code(tokens):
    model, x = Loop(NormExpert), torch.randn(tokens, H, requires_grad=True)
    got, want = run(model, x), model(x)
    assert torch.allclose(got, want, atol=1e-6)
    if tokens:
        got_grads = torch.autograd.grad(got.square().sum(), [x, *model.parameters()], allow_unused=True)
        want_grads = torch.autograd.grad(want.square().sum(), [x, *model.parameters()], allow_unused=True)
        for g, w in zip(got_grads, want_grads, strict=True):
            assert (g is None and w is None) or torch.allclose(g, w, atol=1e-5)


def test_an_expert_that_is_no_mlp_has_its_rows_sorted():
    with torch.no_grad():
        report = moec.explain(Loop(NormExpert), torch.randn(13, H), moec_options=QUICK)
    assert report.graphs == 1
    (site,) = report.sites
    assert (site.status, site.kernels) == ("fused", ("sorted_dispatch", "combine"))
    assert "layer_norm" in site.experts
    assert __file__ in site.location


class Placed(Loop):
    """The body reads a token's place, not only its row."""

    def forward(self, x):
        weights, chosen = torch.topk(F.softmax(self.gate(x), dim=-1), 2, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None] * token[:, None])
        return y


class ListedRows(Loop):
    """Lists of rows, whose lengths only data decide, meet another number for every expert, and are joined behind it."""

    def forward(self, x):
        weights, chosen = F.softmax(self.gate(x), dim=-1).max(-1)
        rows = [torch.eq(chosen, e).nonzero(as_tuple=True)[0] for e in range(E)]
        parts = [self.experts[e](x[rows[e], :]) * (e + 1) for e in range(E)]
        y = x.new_zeros(x.shape)
        for e in range(E):
            y[rows[e], :] = parts[e]
        return y[torch.cat(rows).argsort().argsort().argsort()] * weights[:, None]


@pytest.mark.parametrize("tokens", [1, 13])
def test_a_loop_that_cannot_be_rolled_runs_as_written(tokens):
    model, x = ListedRows(mlp), torch.randn(tokens, H)
    with torch.no_grad():
        assert torch.equal(run(model, x), model(x))


def test_the_reason_names_the_predicate_and_the_line():
    with torch.no_grad():
        report = moec.explain(Placed(NormExpert), torch.randn(13, H), moec_options=QUICK)
    assert report.graphs == 1
    (site,) = report.sites
    assert site.status == "declined"
    assert "layer_norm" in str(site.reasons[0])
    assert __file__ in site.reasons[0].location


def test_an_unsupported_dtype_is_declined_and_runs():
    model, x = Loop(mlp).double(), torch.randn(13, H, dtype=torch.float64)
    with torch.no_grad():
        report = moec.explain(model, x, moec_options=QUICK)
        assert torch.allclose(run(model, x), model(x))
    assert [s.status for s in report.sites] == ["declined"]
    assert "f64" in str(report.sites[0].reasons[0])


def test_a_model_without_experts_has_no_sites():
    model = mlp()
    with torch.no_grad():
        report = moec.explain(model, torch.randn(3, H), moec_options=QUICK)
    assert report.sites == []
    assert report.graphs == 1


def test_an_unknown_option_is_one_clear_line():
    model = mlp()
    with pytest.raises(Exception, match=r"unknown option 'kernel' \(did you mean 'kernels'\?\)"):
        torch.compile(model, backend="moec", options={"kernel": "cpp"})(torch.randn(3, H))


def test_fuel_stops_rewriting():
    model = nn.Sequential(Loop(mlp), Loop(mlp))
    with torch.no_grad():
        report = moec.explain(model, torch.randn(13, H), moec_options={**QUICK, "fuel": 1})
    assert [s.status for s in report.sites] == ["fused", "declined"]


def test_a_checkpointed_block_is_fused_inside():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Stacked()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    class Stacked(nn.Module):
        """Gathered weights and bmm: no loop to roll."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.gate = nn.Parameter(torch.randn(E, H))
            self.up, self.down = nn.Parameter(torch.randn(E, 24, H) * 0.1), nn.Parameter(torch.randn(E, H, 24) * 0.1)

        def forward(self, x):
            weights, chosen = torch.topk(F.softmax(F.linear(x, self.gate), dim=-1), 2, dim=-1)
            rows = torch.einsum("th,tkfh->tkf", x, self.up[chosen])
            rows = torch.einsum("tkf,tkhf->tkh", F.relu(rows), self.down[chosen])
            return torch.einsum("tk,tkh->th", weights, rows)

    model, x = Block(), torch.randn(13, H)
    report = moec.explain(model, x, moec_options={"rest": "aot_eager"})
    assert [s.status for s in report.sites] == ["fused"]
    assert report.graphs == 1
