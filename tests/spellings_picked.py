"""Expert choice in batches: in every sequence each expert takes the tokens that score best with it, [B, E, C]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K, Mlp, Spelling, batches
from torch import nn


class Picking(nn.Module):
    """Scores of every token with every expert; stacked experts on rows[B, E, C, H]."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.w1 = nn.Parameter(torch.randn(E, H, WIDTH) * 0.2)
        self.w2 = nn.Parameter(torch.randn(E, WIDTH, H) * 0.2)

    def pick(self, x):
        """w[B, E, C] and the places of the tokens, [B, E, C]."""
        scores = self.router(x).softmax(-1)
        return torch.topk(scores.transpose(1, 2), max(1, x.shape[1] * K // E), dim=-1)

    def experts(self, rows):
        """All experts on their rows."""
        return torch.einsum("becf,efh->bech", F.gelu(torch.einsum("bech,ehf->becf", rows, self.w1)), self.w2)


class GatheredWide(Picking):
    """Rows by a gather as wide as they are; put back by a flat scatter_add."""

    def forward(self, x):
        w, ids = self.pick(x)
        batch, _, capacity = ids.shape
        wide = ids.unsqueeze(-1).expand(-1, -1, -1, H)
        rows = torch.gather(x.unsqueeze(1).expand(-1, E, -1, -1), 2, wide)
        y = self.experts(rows) * w.unsqueeze(-1)
        flat = wide.reshape(batch, E * capacity, H)
        return torch.zeros_like(x).scatter_add(1, flat, y.reshape(batch, E * capacity, H))


class OneHotEinsum(Picking):
    """Dispatch and combine by a one-hot table of places."""

    def forward(self, x):
        w, ids = self.pick(x)
        table = F.one_hot(ids, x.shape[1]).to(x.dtype)
        y = self.experts(torch.einsum("becs,bsh->bech", table, x))
        return torch.einsum("becs,bec,bech->bsh", table, w, y)


class FlatTokens(Picking):
    """Places in the flat tokens of all sequences; added back by index_add; a gated expert."""

    def __init__(self):
        super().__init__()
        self.w3 = nn.Parameter(torch.randn(E, H, WIDTH) * 0.2)

    def forward(self, x):
        batch, length, _ = x.shape
        w, ids = self.pick(x)
        flat = (ids + torch.arange(batch)[:, None, None] * length).reshape(-1)
        rows = x.reshape(-1, H)[flat].view(batch, E, -1, H)
        up = F.silu(torch.einsum("bech,ehf->becf", rows, self.w1)) * torch.einsum("bech,ehf->becf", rows, self.w3)
        y = torch.einsum("becf,efh->bech", up, self.w2) * w[..., None]
        return torch.zeros(batch * length, H).index_add(0, flat, y.reshape(-1, H)).view_as(x)


class ModuleEach(nn.Module):
    """One module an expert, on its rows of all sequences; stacked again."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def forward(self, x):
        capacity = max(1, x.shape[1] * K // E)
        w, ids = self.router(x).softmax(-1).transpose(1, 2).topk(capacity, dim=-1)
        wide = ids.reshape(x.shape[0], -1, 1).expand(-1, -1, H)
        rows = torch.gather(x, 1, wide).view(x.shape[0], E, capacity, H)
        y = torch.stack([expert(rows[:, e]) for e, expert in enumerate(self.experts)], dim=1) * w.unsqueeze(-1)
        return torch.zeros_like(x).scatter_add_(1, wide, y.view(x.shape[0], E * capacity, H))


SPELLINGS = tuple(
    Spelling(kind.__name__, "P10", kind, batches) for kind in (GatheredWide, OneHotEinsum, FlatTokens, ModuleEach)
)


class AcrossExperts(Picking):
    """Near miss: each expert's second matrix is the next one's first axis: rows move to another expert between them."""

    def forward(self, x):
        w, ids = self.pick(x)
        wide = ids.unsqueeze(-1).expand(-1, -1, -1, H)
        rows = torch.gather(x.unsqueeze(1).expand(-1, E, -1, -1), 2, wide)
        up = F.gelu(torch.einsum("bech,ehf->becf", rows, self.w1)).roll(1, dims=1)
        y = torch.einsum("becf,efh->bech", up, self.w2) * w.unsqueeze(-1)
        return torch.zeros_like(x).scatter_add(1, wide.reshape(x.shape[0], -1, H), y.reshape(x.shape[0], -1, H))


class Swapped(ModuleEach):
    """Near miss: modules run on the rows of other experts than they are put back as."""

    def forward(self, x):
        capacity = max(1, x.shape[1] * K // E)
        w, ids = self.router(x).softmax(-1).transpose(1, 2).topk(capacity, dim=-1)
        wide = ids.reshape(x.shape[0], -1, 1).expand(-1, -1, H)
        rows = torch.gather(x, 1, wide).view(x.shape[0], E, capacity, H)
        outs = [expert(rows[:, e]) for e, expert in enumerate(self.experts)]
        y = torch.stack([outs[1], outs[0], *outs[2:]], dim=1) * w.unsqueeze(-1)
        return torch.zeros_like(x).scatter_add_(1, wide, y.view(x.shape[0], E * capacity, H))


class Tokens(Picking):
    """Near miss: tokens choose, and nobody picks: heads of an ordinary batched product."""

    def forward(self, x):
        rows = x.unsqueeze(1) * self.router(x).transpose(1, 2).unsqueeze(-1)
        return self.experts(rows).sum(1)


NEAR = (AcrossExperts, Swapped, Tokens)
