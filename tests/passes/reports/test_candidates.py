"""Regions that may be an MoE layer are found by what their values do; what is none is not claimed to be one."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moec

H, W, E, T = 16, 24, 4, 13


def mlp():
    return nn.Sequential(nn.Linear(H, W), nn.ReLU(), nn.Linear(W, H))


class Normed(nn.Module):
    """An expert that is not an MLP."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(H, W), nn.LayerNorm(W), nn.Linear(W, H)

    def forward(self, x):
        return self.down(F.silu(self.norm(self.up(x))))


class Loop(nn.Module):
    """Over experts that are no MLPs the body also reads a token's place, so that it is no function of its rows."""

    def __init__(self, expert=Normed):
        super().__init__()
        self.gate, self.experts = nn.Linear(H, E), nn.ModuleList(expert() for _ in range(E))
        self.placed = expert is Normed

    def forward(self, x):
        weights, chosen = torch.topk(F.softmax(self.gate(x), dim=-1), 2, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            out = expert(x[token]) * weights[token, slot, None]
            if self.placed:
                out = out * token[:, None]
            y.index_add_(0, token, out)
        return y


class Written(Loop):
    """Every expert on every token, under a mask; the sum starts from a number, so the loop is traced as written."""

    def forward(self, x):
        weights, chosen = torch.topk(F.softmax(self.gate(x), dim=-1), 2, dim=-1)
        y = 0
        for e, expert in enumerate(self.experts):
            y = y + expert(x) * ((chosen == e) * weights).sum(-1, keepdim=True)
        return y


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E)
        self.up, self.down = nn.Parameter(torch.randn(E, H, W)), nn.Parameter(torch.randn(E, W, H))

    def rows(self, rows):
        inner = F.layer_norm(torch.einsum("ech,ehf->ecf", rows, self.up).relu(), [W])
        return torch.einsum("ecf,efh->ech", inner, self.down)


class ByExpert(Stacked):
    """Experts choose tokens."""

    def forward(self, x):
        weights, tokens = F.softmax(self.gate(x), dim=-1).t().topk(3, dim=-1)
        rows = self.rows(x[tokens]) * weights[..., None]
        return torch.zeros_like(x).index_add_(0, tokens.flatten(), rows.flatten(0, 1))


class Soft(Stacked):
    """Every token to every expert, by weights: nothing is chosen."""

    def forward(self, x):
        logits = self.gate(x)
        rows = torch.einsum("th,te->eth", x, logits.softmax(0))
        return torch.einsum("eth,te->th", self.rows(rows), logits.softmax(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(H, H) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).view(T, 4, 4).transpose(0, 1) for f in (self.q, self.k, self.v))
        return x + self.o((F.softmax(q @ k.transpose(1, 2), dim=-1) @ v).transpose(0, 1).reshape(T, H))


class Sparse(Attention):
    """Attention to the best keys: a top-k, an index and a weighted sum, but no experts."""

    def forward(self, x):
        best, at = (self.q(x) @ self.k(x).t()).topk(4, dim=-1)
        return torch.einsum("tk,tkh->th", best.softmax(-1), self.v(x)[at])


class Depth(nn.Module):
    """Only some tokens go through a gated layer: a choice, and like-shaped products that wait for each other."""

    def __init__(self):
        super().__init__()
        self.gate, self.a, self.b, self.c = nn.Linear(H, 1), nn.Linear(H, W), nn.Linear(H, W), nn.Linear(W, H)

    def forward(self, x):
        at = self.gate(x)[:, 0].topk(5).indices
        rows = x[at]
        return x.index_add(0, at, self.c(F.silu(self.a(rows)) * self.b(rows)))


class Codebook(nn.Module):
    def __init__(self):
        super().__init__()
        self.codes, self.out = nn.Parameter(torch.randn(9, H)), nn.Linear(H, H)

    def forward(self, x):
        return self.out(self.codes[torch.cdist(x, self.codes).argmin(-1)])


class Noise(nn.Module):
    """Dropout written by hand is a comparison, but of nothing that came from data."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x):
        return F.silu(self.a(x)) * self.b(x) * (torch.rand(T, H) > 0.1)


class Model(nn.Module):
    """Attention and a layer, twice, and a head that draws the next word."""

    def __init__(self, layer):
        super().__init__()
        self.words, self.head = nn.Embedding(32, H), nn.Linear(H, 32)
        self.layers = nn.ModuleList(nn.ModuleList([Attention(), layer()]) for _ in range(2))

    def forward(self, ids):
        x = self.words(ids)
        for attention, layer in self.layers:
            x = attention(x)
            x = x + layer(x)
        best, at = self.head(x[-1:]).topk(5)
        return at.gather(1, torch.multinomial(best.softmax(-1), 1))


def explain(model, *args):
    torch._dynamo.reset()
    with torch.no_grad():
        return moec.explain(model, *(args or (torch.randn(T, H),)), moec_options={"rest": "eager"})


@pytest.mark.parametrize(
    ("layer", "chosen", "experts"),
    [
        (Loop, "top-2 of 4", "4 experts, loop"),
        (Written, "top-2 of 4", "4 experts, each"),
        (ByExpert, "top-3 of 13", "4 experts, batched"),
    ],
)
def test_a_layer_that_is_not_fused_is_a_candidate_with_its_choice_and_its_experts(layer, chosen, experts):
    report = explain(layer())
    (region,) = report.regions
    assert (region.status, region.chosen) == ("declined", chosen)
    assert region.experts.startswith(experts)
    (site,) = report.sites
    assert site.status == "declined"
    assert __file__ in site.location


@pytest.mark.parametrize("layer", [Loop, Written, ByExpert])
def test_every_layer_of_a_model_is_a_candidate_of_its_own(layer):
    report = explain(Model(layer), torch.arange(T))
    assert [s.status for s in report.sites] == ["declined"] * 2
    assert [r.status for r in report.regions] == ["declined", "declined", "rejected"]
    assert report.regions[-1].chosen.startswith("top-5 of 32")
    names = [s.name for s in report.sites]
    assert all(f"layers.{i}.1" in name for i, name in enumerate(names)), names


@pytest.mark.parametrize("model", [Attention, Sparse, Depth, Codebook, Noise, mlp])
def test_what_is_no_moe_layer_is_not_claimed_to_be_one(model):
    report = explain(model())
    assert report.sites == []
    assert all(r.status == "rejected" and r.why for r in report.regions)
    assert "no MoE layer was found" in str(report)


def test_a_dense_model_says_so_and_what_was_looked_at():
    report = explain(Model(mlp), torch.arange(T))
    assert report.sites == []
    text = str(report)
    assert "no MoE layer was found" in text
    assert "top-5 of 32" in text


def test_a_soft_mixture_is_told_that_nothing_is_chosen():
    (site,) = explain(Soft()).sites
    assert [c.held for c in site.checks] == [True, True, False]
    assert site.checks[-1].predicate == "experts are chosen"
    assert all(c.location.startswith(f"{__file__}:") for c in (*site.checks, *site.reasons)), site
    assert "runs as it was written" in site.reasons[0].hint


def test_fused_layers_are_regions_too():
    report = explain(Model(lambda: Loop(mlp)), torch.arange(T))
    assert [s.status for s in report.sites] == ["fused"] * 2
    assert [r.status for r in report.regions] == ["fused", "fused", "rejected"]


def test_the_ladder_holds_up_to_the_first_failure_at_the_users_line():
    (site,) = explain(Loop()).sites
    assert [c.held for c in site.checks] == [True, True, True, False]
    failed = site.checks[-1]
    assert failed.predicate == "an expert is matrices and pointwise functions"
    assert "layer_norm" in failed.value
    line = next(
        n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "self.norm(self.up(x))" in text
    )
    assert failed.location == f"{__file__}:{line}"
    assert "normalisations" in site.reasons[0].hint


def test_the_nearest_miss_comes_first():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.far, self.near = Soft(), Written()

        def forward(self, x):
            return self.far(x) + self.near(x)

    report = explain(Two())
    assert [s.status for s in report.sites] == ["declined"] * 2
    near, far = report.near_misses
    assert near.held > far.held
    assert str(report).index(f"{near.name}: not fused") < str(report).index(f"{far.name}: not fused")
