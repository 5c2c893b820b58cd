"""Layers without a loop or a sort: which experts count is said by the axes of products, gathers and sums alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, Gated, H, K, Spelling, batches, tokens
from spellings_strangers import Chosen
from torch import nn


class Banked(nn.Module):
    """A router, and parameters with an axis of experts."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, H, WIDTH) * 0.2)
        self.down = nn.Parameter(torch.randn(E, WIDTH, H) * 0.2)
        self.more()

    def more(self):
        """Further parameters."""

    choose = Chosen.choose


class StackedThenGathered(Chosen):
    """Every expert on every token, stacked; the chosen results are gathered."""

    def forward(self, x):
        w, chosen = self.choose(x)
        every = torch.stack([expert(x) for expert in self.experts], 1)
        return (w.unsqueeze(-1) * every.gather(1, chosen.unsqueeze(-1).expand(-1, -1, H))).sum(1)


class TakenAlong(Chosen):
    """`take_along_dim`, whose index is spread over the features; tokens on two axes."""

    expert = Gated

    def forward(self, x):
        w, chosen = self.choose(x)
        every = torch.stack([expert(x) for expert in self.experts], dim=2)
        return (torch.take_along_dim(every, chosen[..., None], dim=2) * w[..., None]).sum(dim=2)


class IndexedByPlace(Chosen):
    """Results by expert first, indexed by expert and token; a batched product is the sum."""

    def forward(self, x):
        w, chosen = self.choose(x)
        every = torch.stack([expert(x) for expert in self.experts])
        rows = every[chosen, torch.arange(x.size(0)).unsqueeze(1)]
        return torch.bmm(w.unsqueeze(1), rows).squeeze(1)


class LastAxis(Chosen):
    """Experts on the last axis."""

    def forward(self, x):
        w, chosen = self.choose(x)
        every = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (every.gather(-1, chosen.unsqueeze(1).expand(-1, H, -1)) * w.unsqueeze(1)).sum(-1)


class SpreadMatmul(Banked):
    """`@` spreads the tokens over slots and experts' matrices."""

    def forward(self, x):
        w, chosen = self.choose(x)
        hidden = F.silu(x[:, None, None] @ self.up[chosen])
        return ((hidden @ self.down[chosen]).squeeze(2) * w[..., None]).sum(1)


class SpreadOverExperts(Banked):
    """x @ w[E, H, F]: every expert by one `@`; the chosen ones one slot after the other."""

    def forward(self, x):
        w, chosen = self.choose(x)
        every = F.relu(x @ self.up) @ self.down
        places = torch.arange(x.shape[0])
        rows = torch.stack([every[chosen[:, s], places] for s in range(K)], 1)
        return (rows * w[..., None]).sum(1), w


class MultipliedAndSummed(Banked):
    """Products written as `*` and `sum`."""

    def forward(self, x):
        w, chosen = self.choose(x)
        hidden = F.relu((self.up[chosen] * x[:, None, :, None]).sum(-2)) ** 2
        return (w.unsqueeze(-1) * (self.down[chosen] * hidden.unsqueeze(-1)).sum(-2)).sum(1)


class DenseThenGathered(Banked):
    """The first product of all experts by `tensordot`, the second with gathered weights."""

    def forward(self, x):
        w, chosen = self.choose(x)
        hidden = torch.tensordot(x, self.up, dims=([1], [1]))
        hidden = F.gelu(hidden)[torch.arange(x.shape[0]).unsqueeze(-1), chosen]
        return torch.einsum("ts,tsf,tsfh->th", w, hidden, self.down[chosen])


class SlotsFirst(Banked):
    """Choices [k, T], and weights on the hidden row."""

    def forward(self, x):
        w, chosen = self.choose(x)
        w, chosen = w.t(), chosen.t()
        hidden = F.relu(torch.einsum("...h,k...hf->k...f", x, self.up[chosen])) * w[..., None]
        return torch.einsum("ktf,ktfh->th", hidden, self.down[chosen])


class OneExpert(Banked):
    """One expert a token, and no sum: a gate times a row, added to x."""

    def forward(self, x):
        gate, chosen = F.softmax(self.router(x), -1).max(-1)
        hidden = F.relu(torch.bmm(x.unsqueeze(1), self.up[chosen]))
        return x + torch.bmm(hidden, self.down[chosen]).squeeze(1) * gate[:, None]


class OneExpertOnAxes(Banked):
    """One expert a token on two axes, with no weight at all."""

    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        hidden = F.relu(torch.einsum("bth,bthf->btf", x, self.up[chosen]))
        return torch.einsum("btf,btfh->bth", hidden, self.down[chosen])


class WholeSequences(Banked):
    """A sequence's mean chooses for all of its tokens."""

    def forward(self, x):
        w, chosen = self.choose(x.mean(1))
        hidden = F.relu(torch.einsum("bth,bkhf->bktf", x, self.up[chosen]))
        return (torch.einsum("bktf,bkfh->bkth", hidden, self.down[chosen]) * w[:, :, None, None]).sum(1)


class OneBias(Banked):
    """Of two projections one has a bias; a GLU's halves have one together."""

    def more(self):
        self.bias = nn.Parameter(torch.randn(E, WIDTH))
        self.beside = nn.Parameter(torch.randn(E, H, WIDTH) * 0.2)

    def forward(self, x):
        w, chosen = self.choose(x)
        a = torch.einsum("th,tkhf->tkf", x, self.up[chosen]) + self.bias[chosen]
        b = torch.einsum("th,tkhf->tkf", x, self.beside[chosen])
        return torch.einsum("tkf,tkfh,tk->th", F.silu(a) * b, self.down[chosen], w)


class GluWithBiases(Banked):
    """Every expert by `baddbmm` and `glu`, gathered by choices of each slot."""

    def more(self):
        self.up = nn.Parameter(torch.randn(E, H, 2 * WIDTH) * 0.2)
        self.bias, self.out = nn.Parameter(torch.randn(E, 1, 2 * WIDTH)), nn.Parameter(torch.randn(E, 1, H))

    def forward(self, x):
        w, chosen = self.choose(x)
        hidden = F.glu(torch.baddbmm(self.bias, x.expand(E, *x.shape), self.up), -1)
        every = torch.baddbmm(self.out, hidden, self.down)
        return (every[chosen.t(), torch.arange(x.shape[0])[None, :]] * w.t().unsqueeze(-1)).sum(0)


class GatheredForAll(Banked):
    """Every token for every expert by an index that counts the tokens anew for each; gates weight what experts read."""

    def forward(self, x):
        logits = self.router(x)
        best, chosen = logits.topk(K, 1)
        gates = torch.sigmoid(torch.full_like(logits, float("-inf")).scatter_(1, chosen, best).float()).to(x.dtype).t()
        token = torch.arange(x.shape[0]).view(1, -1).expand(E, -1).reshape(-1, 1).expand(-1, H)
        rows = (torch.gather(x, 0, token) * gates.reshape(-1, 1)).view(E, -1, H)
        rows = torch.bmm(F.silu(torch.bmm(rows, self.up)), self.down)
        return torch.zeros_like(x).scatter_add(0, token, rows.view(-1, H))


class TwoChoices(Banked):
    """Near miss: the second matrices are other experts'."""

    def forward(self, x):
        w, chosen = self.choose(x)
        hidden = F.relu(torch.einsum("th,tkhf->tkf", x, self.up[chosen]))
        rows = torch.einsum("tkf,tkfh->tkh", hidden, self.down[chosen.flip(1)])
        return (rows * w[..., None]).sum(1)


class OtherTokens(Banked):
    """Near miss: rows of tokens in reverse order."""

    def forward(self, x):
        w, chosen = self.choose(x)
        every = F.relu(x @ self.up) @ self.down
        return (every[chosen, torch.arange(x.shape[0]).flip(0)[:, None]] * w[..., None]).sum(1)


class FeatureElsewhere(Banked):
    """Near miss: one feature of one row is another expert's."""

    def forward(self, x):
        w, chosen = self.choose(x)
        every = (F.relu(x @ self.up) @ self.down).transpose(0, 1)
        index = chosen[:, :, None].expand(-1, -1, H).clone()
        index[:, 0, 0] = 0
        return (every.gather(1, index) * w[..., None]).sum(1)


class SlotsAsTokens(Banked):
    """Near miss: every token reads the rows of the first ones."""

    def forward(self, x):
        w, chosen = self.choose(x)
        every = F.relu(x @ self.up) @ self.down
        return (every[chosen, torch.arange(K)[None, :]] * w[..., None]).sum(1)


SPELLINGS = (
    Spelling("stacked, then gathered", "P6", StackedThenGathered, tokens),
    Spelling("take_along_dim", "P6", TakenAlong, batches),
    Spelling("indexed by expert and token", "P6", IndexedByPlace, tokens),
    Spelling("experts last", "P6", LastAxis, tokens),
    Spelling("matmul spreads", "P5", SpreadMatmul, tokens),
    Spelling("matmul over experts", "P6", SpreadOverExperts, tokens, sites=2),
    Spelling("mul and sum", "P5", MultipliedAndSummed, tokens),
    Spelling("dense, then gathered", "P5", DenseThenGathered, tokens),
    Spelling("slots first", "P5", SlotsFirst, tokens),
    Spelling("one expert", "P5", OneExpert, tokens),
    Spelling("one expert on axes", "P5", OneExpertOnAxes, batches),
    Spelling("whole sequences", "P5", WholeSequences, batches),
    Spelling("one bias", "P5", OneBias, tokens),
    Spelling("gathered for all", "P6", GatheredForAll, tokens),
    Spelling("glu with biases", "P6", GluWithBiases, tokens),
)

NEAR = (TwoChoices, OtherTokens, FeatureElsewhere, SlotsAsTokens)
