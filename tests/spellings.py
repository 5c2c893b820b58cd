"""Spellings P1–P6, P8–P12 as data: one record an example, for one table over all spellings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, Gated, H, K, Mlp, Routed, Spelling, batches, groups, tokens
from spellings_capacity import SPELLINGS as CAPACITY
from test_handwritten import EnumerateLoop, HitLoop, MaskLoop, WhereLoop
from torch import nn


class Banks(Routed):
    """Experts as stacked parameters."""

    def __init__(self):
        super().__init__()
        self.experts = None
        self.up = nn.Parameter(torch.randn(E, 2 * WIDTH, H) * 0.2)
        self.down = nn.Parameter(torch.randn(E, H, WIDTH) * 0.2)


class HitBanks(Banks):
    """The experts that are hit, from a permuted one-hot."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        mask = F.one_hot(chosen, E).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[e[0]])
            gate, up = F.linear(x[token], self.up[e[0]]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, self.down[e[0]])
            y.index_add_(0, token, rows * w[token, slot, None])
        return y


class HitSqueezed(Banks):
    """The list of hit experts squeezed to one axis; a mask of the choices in each turn."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        mask = F.one_hot(chosen, E).permute(2, 1, 0)
        for e in (mask.sum(dim=(-1, -2)) > 0).nonzero().squeeze(-1):
            slot, token = torch.where(mask[e])
            gate, up = F.linear(x[token], self.up[e]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, self.down[e])
            y.index_add_(0, token, rows * w[token, slot].unsqueeze(-1))
        return y


class BankWhere(Banks):
    """range(E) over slices of stacked weights."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(chosen == e)
            gate, up = F.linear(x[token], self.up[e]).chunk(2, dim=-1)
            y.index_add_(0, token, F.linear(F.silu(gate) * up, self.down[e]) * w[token, slot, None])
        return y


class BankSkip(Banks):
    """Experts without tokens are skipped."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(chosen == e)
            if token.numel() == 0:
                continue
            gate, up = F.linear(x[token], self.up[e]).chunk(2, dim=-1)
            y[token] += w[token, slot, None] * F.linear(F.silu(gate) * up, self.down[e])
        return y


class BankMatmul(Banks):
    """Matrices used transposed, by @."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(chosen == e)
            gate, up = (x[token] @ self.up[e].t()).chunk(2, dim=-1)
            rows = (F.silu(gate) * up) @ self.down[e].t()
            y.index_add_(0, token, rows * w[token, slot].unsqueeze(-1))
        return y


class Grouped(Banks):
    """Sorted rows and grouped products; the order undone by argsort."""

    def groups(self, x, chosen):
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        ends = torch.histc(flat.float(), bins=E, min=0, max=E - 1).cumsum(0).to(torch.int32)
        gate, up = groups(x[order // K], self.up.transpose(1, 2), ends).chunk(2, dim=-1)
        return order, groups(F.silu(gate) * up, self.down.transpose(1, 2), ends)

    def forward(self, x):
        w, chosen = self.choose(x)
        order, rows = self.groups(x, chosen)
        rows = rows * w.reshape(-1)[order].unsqueeze(-1)
        return rows[order.argsort()].view(-1, K, H).sum(1)


class GroupedAdd(Grouped):
    """Added to their tokens from sorted order."""

    def forward(self, x):
        w, chosen = self.choose(x)
        order, rows = self.groups(x, chosen)
        return torch.zeros_like(x).index_add_(0, order // K, rows * w.reshape(-1)[order, None])


class GroupedPut(Grouped):
    """The inverse order written by index."""

    def forward(self, x):
        w, chosen = self.choose(x)
        order, rows = self.groups(x, chosen)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=x.device)
        return (rows * w.reshape(-1)[order, None])[back].view(-1, K, H).sum(1)


class GatheredBmm(Banks):
    """Each pair's matrices gathered, bmm."""

    def forward(self, x):
        w, chosen = self.choose(x)
        flat = chosen.reshape(-1)
        gate, up = torch.bmm(self.up[flat], x.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        rows = torch.bmm(self.down[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (rows * w.reshape(-1, 1)).view(-1, K, H).sum(1)


class GatheredEinsum(Banks):
    """Each pair's matrices gathered, einsum."""

    def forward(self, x):
        w, chosen = self.choose(x)
        gate, up = torch.einsum("th,tkfh->tkf", x, self.up[chosen]).chunk(2, dim=-1)
        return torch.einsum("tk,tkh->th", w, torch.einsum("tkf,tkhf->tkh", F.silu(gate) * up, self.down[chosen]))


class GatheredExpand(Banks):
    """Tokens expanded to their slots."""

    def forward(self, x):
        w, chosen = self.choose(x)
        rows = x.unsqueeze(1).expand(-1, K, -1)
        gate, up = torch.einsum("tkh,tkfh->tkf", rows, self.up[chosen]).chunk(2, dim=-1)
        rows = torch.einsum("tkf,tkhf->tkh", F.silu(gate) * up, self.down[chosen])
        return (rows * w.unsqueeze(-1)).sum(1)


class Gates(nn.Module):
    """Gates g[…, E] that are 0 but for the chosen experts."""

    def __init__(self, expert=Mlp):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(E))
        self.w1, self.w3 = (nn.Parameter(torch.randn(E, H, WIDTH) * 0.2) for _ in "13")
        self.w2 = nn.Parameter(torch.randn(E, WIDTH, H) * 0.2)

    def scattered(self, x):
        p = self.router(x).softmax(-1)
        w, chosen = p.topk(K, -1)
        return torch.zeros_like(p).scatter(-1, chosen, w / w.sum(-1, keepdim=True))

    def masked(self, x):
        logits = self.router(x)
        return logits.softmax(-1) * F.one_hot(logits.topk(K, -1).indices, E).sum(-2)

    def sunk(self, x):
        logits = self.router(x)
        w, chosen = logits.topk(K, -1)
        return torch.full_like(logits, float("-inf")).scatter(-1, chosen, w).softmax(-1)


class DenseEinsum(Gates):
    def forward(self, x):
        h = F.silu(torch.einsum("th,ehf->tef", x, self.w1)) * torch.einsum("th,ehf->tef", x, self.w3)
        return torch.einsum("te,teh->th", self.sunk(x), torch.einsum("tef,efh->teh", h, self.w2))


class DenseBmm(Gates):
    def forward(self, x):
        rows = x.unsqueeze(0).expand(E, -1, -1)
        h = torch.bmm(F.silu(torch.bmm(rows, self.w1)) * torch.bmm(rows, self.w3), self.w2)
        return (h * self.scattered(x).t().unsqueeze(-1)).sum(0)


class DenseRepeat(Gates):
    def forward(self, x):
        h = torch.bmm(F.gelu(torch.bmm(x.repeat(E, 1).view(E, -1, H), self.w1)), self.w2)
        return (h * self.masked(x).t()[:, :, None]).sum(0)


class DenseStack(Gates):
    def forward(self, x):
        rows = torch.stack([expert(x) for expert in self.experts], dim=1)
        return torch.bmm(self.scattered(x).unsqueeze(1), rows).squeeze(1)


class MaskedColumns(Gates):
    """g[:, e:e+1] · expert(x), summed in a loop."""

    def forward(self, x):
        g, y = self.scattered(x), torch.zeros_like(x)
        for e in range(E):
            y = y + g[:, e : e + 1] * self.experts[e](x)
        return y


class MaskedInPlace(Gates):
    """Batches of tokens; the sum in place; gates renormalised after masking."""

    def forward(self, x):
        g, y = self.masked(x), torch.zeros_like(x)
        g = g / g.sum(-1, keepdim=True)
        for e in range(E):
            y += self.experts[e](x) * g[..., e : e + 1]
        return y


class MaskedChoices(Gates):
    """A weight a turn from the choices themselves."""

    def forward(self, x):
        w, chosen = self.router(x).softmax(-1).topk(K, -1)
        y = torch.zeros_like(x)
        for e in range(E):
            y = y + (w * (chosen == e)).sum(-1, keepdim=True) * self.experts[e](x)
        return y


class MaskedUnrolled(Gates):
    """Written out."""

    def forward(self, x):
        g = self.sunk(x)
        a, b, c, d = self.experts
        return (
            a(x) * g[:, 0].unsqueeze(-1) + b(x) * g[:, 1].unsqueeze(-1) + (c(x) * g[:, 2, None] + d(x) * g[:, 3, None])
        )


class Shared(WhereLoop):
    """A shared expert of another width."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(H, 40), nn.GELU(), nn.Linear(40, H))

    def forward(self, x):
        return super().forward(x) + self.shared(x)


class SharedSame(WhereLoop):
    def __init__(self):
        super().__init__()
        self.shared = Gated()

    def forward(self, x):
        return self.shared(x) + super().forward(x)


class SharedGated(SharedSame):
    def __init__(self):
        super().__init__()
        self.shared_gate = nn.Linear(H, 1, bias=False)

    def forward(self, x):
        return WhereLoop.forward(self, x) + torch.sigmoid(self.shared_gate(x)) * self.shared(x)


class Sigmoid(WhereLoop):
    def route(self, x):
        scores = torch.sigmoid(self.gate(x))
        w, chosen = torch.topk(scores, self.k, dim=-1)
        return 2.5 * w / (w.sum(-1, keepdim=True) + 1e-20), chosen


class Corrected(WhereLoop):
    """A bias that corrects the choice alone, the best groups of experts."""

    def __init__(self):
        super().__init__(experts=8)
        self.register_buffer("bias", torch.randn(8) * 0.1)

    def route(self, x):
        scores = self.gate(x).sigmoid()
        choice = (scores + self.bias).view(-1, 4, 2)
        best = torch.topk(choice.topk(2, dim=-1)[0].sum(-1), 2, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(choice[..., 0]).scatter_(1, best, 1).unsqueeze(-1).expand(-1, 4, 2)
        chosen = torch.topk(choice.masked_fill(~mask.bool(), 0.0).view(-1, 8), self.k, dim=-1, sorted=False)[1]
        w = scores.gather(1, chosen)
        return w / w.sum(-1, keepdim=True), chosen


class Softplus(WhereLoop):
    def route(self, x):
        w, chosen = torch.topk(F.softplus(self.gate(x)).sqrt(), self.k, dim=-1)
        return w / w.sum(-1, keepdim=True), chosen


class Cosine(WhereLoop):
    def route(self, x):
        scores = F.normalize(x, dim=-1) @ F.normalize(self.gate.weight, dim=-1).t()
        w, chosen = torch.topk(F.softmax(scores / 0.3, dim=-1), self.k, dim=-1)
        return w, chosen


class Losses(WhereLoop):
    """Load balance, z-loss, importance; the logits returned."""

    def forward(self, x):
        logits = self.gate(x)
        p = logits.softmax(-1)
        load = F.one_hot(torch.topk(p, self.k, -1).indices, E).float().mean((0, 1))
        importance = p.sum(0)
        aux = E * (load * p.mean(0)).sum() + 1e-3 * torch.logsumexp(logits, -1).square().mean()
        aux = aux + importance.var() / importance.mean().square()
        aux = aux + (self.gate.weight @ self.gate.weight.t() - torch.eye(E)).abs().sum()
        return super().forward(x), aux, logits


def _records(spelling, *kinds, inputs=tokens):
    return tuple(Spelling(kind.__name__, spelling, kind, inputs) for kind in kinds)


SPELLINGS = (
    *_records("P1", WhereLoop, MaskLoop, EnumerateLoop),
    *_records("P2", HitLoop, HitBanks, HitSqueezed),
    *_records("P3", BankWhere, BankSkip, BankMatmul),
    *_records("P4", Grouped, GroupedAdd, GroupedPut),
    *_records("P5", GatheredBmm, GatheredEinsum, GatheredExpand),
    *_records("P6", DenseEinsum, DenseBmm, DenseRepeat, DenseStack),
    *_records("P9", MaskedColumns, MaskedChoices, MaskedUnrolled),
    *_records("P9", MaskedInPlace, inputs=batches),
    *_records("P11", Shared, SharedSame, SharedGated),
    *_records("P12", Sigmoid, Corrected, Softplus, Cosine, Losses),
    *CAPACITY,
)
