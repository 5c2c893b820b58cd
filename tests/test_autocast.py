"""Layers under autocast: its casts are part of the graph, so experts are fused in the dtype that it computes in."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moec
from moec.backend import compile_graph

H, WIDTH, E, K = 32, 48, 4, 2
BF16 = torch.bfloat16
QUICK = {"rest": "eager", "kernels": "eager"}


class Stacked(nn.Module):
    """A loop over stacked weights."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, 2 * WIDTH, H) / H**0.5)
        self.down = nn.Parameter(torch.randn(E, H, WIDTH) / WIDTH**0.5)

    def route(self, x):
        return self.gate(x).softmax(-1).topk(K, -1)

    def forward(self, x):
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(chosen == e)
            a, b = F.linear(x[token], self.up[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(a) * b, self.down[e])
            out.index_add_(0, token, (y * weights[token, slot, None]).to(out.dtype))
        return out


class Separate(nn.Module):
    """A loop over modules with biases."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(H, WIDTH), nn.GELU(), nn.Linear(WIDTH, H)) for _ in range(E)
        )

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, (expert(x[token]) * weights[token, slot, None]).to(out.dtype))
        return out


class Gathered(Stacked):
    """Each token's matrices picked from stacked weights."""

    def forward(self, x):
        weights, chosen = self.route(x)
        a, b = torch.einsum("th,tkfh->tkf", x, self.up[chosen]).chunk(2, dim=-1)
        y = torch.einsum("tkf,tkhf->tkh", F.silu(a) * b, self.down[chosen])
        return torch.einsum("tk,tkh->th", weights, y)


class Dense(Stacked):
    """Every expert on every token."""

    def forward(self, x):
        weights, chosen = self.route(x)
        gates = torch.zeros(len(x), E, dtype=weights.dtype).scatter(1, chosen, weights)
        a, b = torch.einsum("th,efh->tef", x, self.up).chunk(2, dim=-1)
        return torch.einsum("tef,ehf,te->th", F.silu(a) * b, self.down, gates)


class Biased(Stacked):
    """Biases that are added by hand: no operator casts them, so they are added in fp32."""

    def __init__(self):
        super().__init__()
        self.up_bias = nn.Parameter(torch.randn(E, 2 * WIDTH))
        self.down_bias = nn.Parameter(torch.randn(E, H))

    def act(self, ab):
        a, b = ab[..., ::2].clamp(max=7.0), ab[..., 1::2].clamp(-7.0, 7.0)
        return (b + 1) * a * torch.sigmoid(a * 1.702)

    def forward(self, x):
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(chosen == e)
            ab = x[token] @ self.up[e].t() + self.up_bias[e]
            y = self.act(ab) @ self.down[e].t() + self.down_bias[e]
            out.index_add_(0, token, (y * weights[token, slot, None]).to(out.dtype))
        return out


class BiasedGathered(Biased):
    """The same with picked matrices and biases."""

    def forward(self, x):
        weights, chosen = self.route(x)
        ab = torch.einsum("th,tkfh->tkf", x, self.up[chosen]) + self.up_bias[chosen]
        y = torch.einsum("tkf,tkhf->tkh", self.act(ab), self.down[chosen]) + self.down_bias[chosen]
        return torch.einsum("tkh,tk->th", y, weights)


class BiasedDense(Biased):
    """The same for every expert on every token, which is repeated before it is cast."""

    def forward(self, x):
        weights, chosen = self.route(x)
        gates = torch.zeros(len(x), E, dtype=weights.dtype).scatter(1, chosen, weights)
        rows = x.repeat(E, 1).view(E, -1, H)
        ab = torch.bmm(rows, self.up.transpose(1, 2)) + self.up_bias[:, None]
        y = torch.bmm(self.act(ab), self.down.transpose(1, 2)) + self.down_bias[:, None]
        return (y * gates.t()[..., None]).sum(0)


class Inside(Stacked):
    """A block that chooses its own dtype."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=BF16):
            y = super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return y + self.gate.weight.sum()


FORMS = (Stacked, Separate, Gathered, Dense, Biased, BiasedGathered, BiasedDense)


def made(form):
    torch.manual_seed(0)
    return form()


def results(model, x, enabled=True):
    """Output and gradients."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=BF16, enabled=enabled):
        y = model(x)
    grads = torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()])
    return [y, *grads]


def assert_as_good(got, eager, exact):
    """Each tensor's error is no worse than eager's own, but for a part of bf16's rounding."""
    for ours, theirs, want in zip(got, eager, exact, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        size = want.norm().clamp(min=1e-6)
        assert (ours - want).norm() / size <= 1.5 * (theirs - want).norm() / size + 2e-3


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_a_training_step(form, tokens):
    model, x = made(form), torch.randn(tokens, H)
    with torch.no_grad():  # no token's choice may hang on the rounding of its scores
        model.gate.weight *= 8
    rest = "inductor" if tokens == 7 else "aot_eager"  # who compiles what is not MoE is not on trial for every size
    compiled = torch.compile(model, backend="moec", dynamic=False, options={"rest": rest})
    assert_as_good(results(compiled, x), results(model, x), results(model, x, enabled=False))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_experts_are_fused_in_the_dtype_of_autocast(form):
    model, x = made(form), torch.randn(13, H)
    with torch.autocast("cpu", dtype=BF16):
        report = moec.explain(model, x, moec_options=QUICK)
    (site,) = report.sites
    assert site.status == "fused", site.reasons
    assert "bf16" in site.spec
    assert report.graphs == 1


def test_biases_are_read_in_their_own_dtype():
    model, x = made(Biased), torch.randn(13, H)
    with torch.autocast("cpu", dtype=BF16):
        (site,) = moec.explain(model, x, moec_options=QUICK).sites
    assert "biases=f32" in site.spec


def test_biases_rounded_to_less_than_the_products_are_declined():
    class Rounded(Biased):
        def forward(self, x):
            chosen = self.gate(x).topk(1, -1).indices[:, 0]
            out = torch.zeros_like(x)
            for e in range(E):
                token = torch.where(chosen == e)[0]
                ab = x[token] @ self.up[e].t() + self.up_bias[e].to(BF16)
                out[token] += self.act(ab) @ self.down[e].t() + self.down_bias[e]
            return out

    model, x = made(Rounded), torch.randn(13, H)
    (site,) = moec.explain(model, x, moec_options=QUICK).sites
    assert site.status == "declined"
    assert "matrices are used in f32, biases in bf16, f32" in str(site.reasons[0])
    assert torch.equal(torch.compile(model, backend="moec", options=QUICK)(x), model(x))


@pytest.mark.parametrize("options", [{}, QUICK], ids=["kernels", "twin"])
def test_inference(options):
    model, x = made(Stacked), torch.randn(13, H)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        got = torch.compile(model, backend="moec", options=options)(x)
        want = model(x)
    assert got.dtype == want.dtype
    assert torch.allclose(got, want, rtol=2e-2, atol=2e-2)


def test_few_tokens_are_declined_where_a_loop_casts_few_matrices():
    model, x = made(Stacked), torch.randn(E - 1, H)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        (site,) = moec.explain(model, x, moec_options=QUICK).sites
    assert site.status == "declined"
    assert "few experts" in str(site.reasons[0])
    assert "bf16" in site.reasons[0].hint


def test_a_block_that_enters_autocast():
    model, x = made(Inside), torch.randn(13, H)
    report = moec.explain(model, x, moec_options=QUICK)
    assert [site.status for site in report.sites] == ["fused"]
    assert torch.allclose(torch.compile(model, backend="moec")(x), model(x), rtol=2e-2, atol=2e-2)


def test_a_checkpointed_block():
    model, x = made(Stacked), torch.randn(13, H)

    def call(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    def grads(call):
        with torch.autocast("cpu", dtype=BF16):
            y = call(x)
        return [y, *torch.autograd.grad(y.sum(), list(model.parameters()))]

    for ours, theirs in zip(grads(torch.compile(call, backend="moec")), grads(call), strict=True):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


def test_without_autocast_nothing_is_inserted():
    model, x = made(Stacked), torch.randn(13, H)
    before: list[int] = []

    def backend(gm, inputs):
        before.append(sum(node.target == "to" for node in gm.graph.nodes))
        call = compile_graph(gm, inputs, options=QUICK)
        before.append(sum(node.target == "to" for node in gm.graph.nodes))
        return call

    torch.compile(model, backend=backend)(x)
    assert before[0] >= before[1]
