"""Banks kept in other forms than [E, …], and what is picked of them or of their results by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K, Mlp, Spelling, batches, tokens
from torch import nn


class Bank(nn.Module):
    """Matrices of the given shapes; renormalised weights of a softmax."""

    UP: tuple[int, ...] = (E, H, WIDTH)
    DOWN: tuple[int, ...] = (E, WIDTH, H)

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(self.UP) * 0.2)
        self.down = nn.Parameter(torch.randn(self.DOWN) * 0.2)

    def choose(self, x):
        """w[…, K] and the experts."""
        w, ids = self.router(x).softmax(-1).topk(K, dim=-1)
        return w / w.sum(-1, keepdim=True), ids

    def gates(self, x):
        """Weights as gates […, E]."""
        w, ids = self.choose(x)
        return torch.zeros(*x.shape[:-1], E).scatter(-1, ids, w)


class SideBySide(Bank):
    """All experts' matrices side by side, [H, E·F] and [E·F, H]; gates between the two products."""

    UP, DOWN = (H, E * WIDTH), (E * WIDTH, H)

    def forward(self, x):
        h = F.silu(x @ self.up).view(*x.shape[:-1], E, WIDTH) * self.gates(x).unsqueeze(-1)
        return h.flatten(-2) @ self.down


class TwoLinears(nn.Module):
    """Two plain linears of width E·F; a bias of the first."""

    def __init__(self):
        super().__init__()
        self.router, self.fc1 = nn.Linear(H, E), nn.Linear(H, E * WIDTH)
        self.fc2 = nn.Linear(E * WIDTH, H, bias=False)

    def forward(self, x):
        p = self.router(x).softmax(-1)
        gates = torch.zeros_like(p).scatter(-1, p.topk(K, dim=-1).indices, 1.0) * p
        h = self.fc1(x).relu().unflatten(-1, (E, WIDTH)) * gates[..., None]
        return self.fc2(h.flatten(-2))


class Between(Bank):
    """Experts between the other two axes."""

    UP, DOWN = (H, E, WIDTH), (WIDTH, E, H)

    def forward(self, x):
        h = F.gelu(torch.einsum("th,hef->tef", x, self.up))
        return torch.einsum("tef,feh,te->th", h, self.down, self.gates(x))


class BetweenGathered(Between):
    """The same, gathered along the second axis."""

    def forward(self, x):
        w, ids = self.choose(x)
        h = F.gelu(torch.einsum("th,htkf->tkf", x, self.up[:, ids]))
        return (torch.einsum("tkf,ftkh->tkh", h, self.down[:, ids]) * w[..., None]).sum(1)


class BetweenBatched(Between):
    """The same, as a batch."""

    def forward(self, x):
        h = torch.bmm(x.unsqueeze(0).expand(E, -1, -1), self.up.permute(1, 0, 2)).relu()
        return (torch.bmm(h, self.down.permute(1, 0, 2)) * self.gates(x).t().unsqueeze(-1)).sum(0)


class Rows(Bank):
    """An expert's matrix is one row of a table."""

    UP, DOWN = (E, H * WIDTH), (E, WIDTH * H)

    def forward(self, x):
        w, ids = self.choose(x)
        up, down = self.up[ids].view(-1, K, WIDTH, H), F.embedding(ids, self.down).view(-1, K, H, WIDTH)
        h = torch.einsum("th,tkfh->tkf", x, up).tanh()
        return torch.einsum("tkf,tkhf,tk->th", h, down, w)


class ByOneHot(Bank):
    """Matrices of the chosen experts by a one-hot product of flat rows."""

    def forward(self, x):
        w, ids = self.choose(x)
        hot = F.one_hot(ids, E).to(x.dtype)
        up = (hot @ self.up.view(E, -1)).view(*ids.shape, H, WIDTH)
        down = (hot @ self.down.view(E, -1)).view(*ids.shape, WIDTH, H)
        return torch.einsum("tkf,tkfh,tk->th", torch.einsum("th,tkhf->tkf", x, up).relu(), down, w)


class ByOneHotEinsum(Bank):
    """The same for one expert a token, by einsum."""

    def forward(self, x):
        w, ids = self.router(x).softmax(-1).max(-1)
        hot = F.one_hot(ids, E).float()
        up, down = torch.einsum("te,ehf->thf", hot, self.up), torch.einsum("te,efh->tfh", hot, self.down)
        return torch.einsum("tf,tfh->th", torch.einsum("th,thf->tf", x, up).relu(), down) * w.unsqueeze(-1)


class ChosenByOneHot(Bank):
    """All experts' results, of which a one-hot mask [T, k, E] leaves the chosen."""

    def forward(self, x):
        w, ids = self.choose(x)
        h = F.silu(torch.einsum("th,ehf->tef", x, self.up))
        y = torch.einsum("tef,efh->teh", h, self.down)
        return torch.einsum("tke,teh,tk->th", F.one_hot(ids, E).to(x.dtype), y, w)


class Unflattened(Bank):
    """The two halves of a gated expert as an axis of two."""

    UP = (E, 2 * WIDTH, H)

    def forward(self, x):
        ab = torch.einsum("th,efh->tef", x, self.up).unflatten(-1, (2, WIDTH))
        return torch.einsum("tef,efh,te->th", F.silu(ab[..., 0, :]) * ab[..., 1, :], self.down, self.gates(x))


class Paired(Bank):
    """Gate and value side by side in pairs."""

    UP = (E, H, 2 * WIDTH)

    def forward(self, x):
        w, ids = self.choose(x)
        ab = torch.einsum("th,tkhf->tkf", x, self.up[ids]).unflatten(-1, (WIDTH, 2))
        return torch.einsum("tkf,tkfh,tk->th", ab[..., 0] * F.gelu(ab[..., 1]), self.down[ids], w)


class Listed(nn.Module):
    """A list of MLPs, each run on every token."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def choose(self, x):
        """w[T, K] and the experts."""
        w, ids = self.router(x).softmax(-1).topk(K, dim=-1)
        return w / w.sum(-1, keepdim=True), ids


class FlatPlace(Listed):
    """Results [T·E, H] taken at t·E + e."""

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.stack([expert(x) for expert in self.experts], 1).reshape(-1, H)
        at = torch.arange(x.shape[0]).unsqueeze(1) * E + ids
        return (y[at.reshape(-1)].view(-1, K, H) * w[..., None]).sum(1)


class FlatPlaceByExpert(Listed):
    """Results [E·T, H] taken at e·T + t."""

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.cat([expert(x) for expert in self.experts], 0)
        at = ids * x.shape[0] + torch.arange(x.shape[0])[:, None]
        return torch.einsum("tkh,tk->th", y.index_select(0, at.flatten()).view(-1, K, H), w)


class CutFromOneRow(Listed):
    """Results one after the other in one row, cut apart by a view."""

    def forward(self, x):
        w, ids = self.choose(x)
        gates = torch.zeros(x.shape[0], E).scatter(1, ids, w)
        y = torch.cat([expert(x) for expert in self.experts], -1).view(-1, E, H)
        return (y * gates[:, :, None]).sum(1)


class Widened(Listed):
    """Gates made as wide as the rows before they are multiplied."""

    def forward(self, x):
        w, ids = self.choose(x)
        gates = torch.zeros(x.shape[0], E).scatter(1, ids, w)
        y = torch.stack([expert(x) for expert in self.experts], 0)
        return (gates.t().unsqueeze(2).expand(-1, -1, H) * y).sum(0)


class ColumnOfGates(Listed):
    """Results stacked last, times a column of gates."""

    def forward(self, x):
        w, ids = self.choose(x)
        gates = torch.zeros(x.shape[0], E).scatter(1, ids, w)
        return (torch.stack([expert(x) for expert in self.experts], -1) @ gates.unsqueeze(-1)).squeeze(-1)


class Threshold(Bank):
    """Gates of the k largest by `kthvalue`, renormalised."""

    def forward(self, x):
        p = self.router(x).softmax(-1)
        gates = p * (p >= p.kthvalue(E - K + 1, dim=-1, keepdim=True).values)
        h = F.gelu(torch.einsum("th,ehf->tef", x, self.up))
        return torch.einsum("tef,efh,te->th", h, self.down, gates / gates.sum(-1, keepdim=True))


DENSE = (TwoLinears, Between, BetweenBatched, Unflattened, CutFromOneRow, Widened, ColumnOfGates, Threshold)
GATHERED = (BetweenGathered, Rows, ByOneHot, ByOneHotEinsum, ChosenByOneHot, Paired, FlatPlace, FlatPlaceByExpert)

SPELLINGS = (
    Spelling("SideBySide", "P6", SideBySide, batches),
    *(Spelling(kind.__name__, "P6", kind, tokens) for kind in DENSE),
    *(Spelling(kind.__name__, "P5", kind, tokens) for kind in GATHERED),
)


class OtherPlace(FlatPlace):
    """Near miss: places that step from token to token by another number than E."""

    def forward(self, x):
        w, ids = self.choose(x)
        y = torch.stack([expert(x) for expert in self.experts], 1).reshape(-1, H)
        at = torch.arange(x.shape[0]).unsqueeze(1) * (E - 1) + ids
        return (y[at.reshape(-1)].view(-1, K, H) * w[..., None]).sum(1)


class Merged(Bank):
    """One matrix a token, the weighted sum of its experts' matrices: up to φ a sum of experts of one matrix."""

    def forward(self, x):
        gates = self.gates(x)
        up, down = torch.einsum("te,ehf->thf", gates, self.up), torch.einsum("te,efh->tfh", gates, self.down)
        return torch.einsum("tf,tfh->th", torch.einsum("th,thf->tf", x, up).relu(), down)


class CutElsewhere(SideBySide):
    """Near miss: the row between the products is cut as [F, E], but the second matrix is kept as [E, F]."""

    def forward(self, x):
        h = F.silu(x @ self.up).view(*x.shape[:-1], WIDTH, E) * self.gates(x).unsqueeze(-2)
        return h.transpose(-1, -2).flatten(-2) @ self.down


class Twice(Bank):
    """The mask counts a token's slots, whose matrices are added up: up to φ a sum of experts of one matrix."""

    def forward(self, x):
        w, ids = self.choose(x)
        hot = F.one_hot(ids, E).to(x.dtype).sum(1)
        up, down = torch.einsum("te,ehf->thf", hot, self.up), torch.einsum("te,efh->tfh", hot, self.down)
        return torch.einsum("tf,tfh->th", torch.einsum("th,thf->tf", x, up).relu(), down) * w[:, :1]


NEAR = (OtherPlace,)
LEGAL = (CutElsewhere, Merged, Twice)
"""What may be fused or not, and computes what it did."""
