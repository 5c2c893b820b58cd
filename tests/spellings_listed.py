"""Rows that an object hands out: gates [T, E] are listed, sorted by expert, cut by counts on the host and joined."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K, Mlp, Spelling, tokens
from torch import nn


class Pairs:
    """The places of gates[T, E] that are not zero, in the order of their experts."""

    def __init__(self, gates):
        self.gates = gates
        pairs = torch.nonzero(gates)
        experts, places = pairs.sort(0)
        _, self.experts = experts.split(1, dim=1)
        self.tokens = pairs[places[:, 1], 0]
        self.sizes = (gates > 0).sum(0).tolist()
        self.weights = torch.gather(gates[self.tokens.flatten()], 1, self.experts)

    def out(self, x):
        return torch.split(x[self.tokens].squeeze(1), self.sizes, dim=0)

    def weights_of(self):
        return torch.split(self.weights, self.sizes, dim=0)

    def back(self, parts, weighted=True):
        rows = torch.cat(parts, 0)
        rows = rows.mul(self.weights) if weighted else rows
        zeros = torch.zeros(self.gates.size(0), parts[-1].size(1), requires_grad=True)
        return zeros.index_add(0, self.tokens, rows.float())


class LogPairs(Pairs):
    """Results that are added up as exponentials."""

    def back(self, parts, weighted=True):
        rows = torch.cat(parts, 0).exp()
        rows = rows.mul(self.weights) if weighted else rows
        total = torch.zeros(self.gates.size(0), parts[-1].size(1)).index_add(0, self.tokens, rows)
        return torch.where(total == 0, torch.full_like(total, 1e-9), total).log()


class Kept(Pairs):
    """The list in expert order, both columns at once; its experts by a sort of their own column."""

    def __init__(self, gates):
        self.gates = gates
        pairs = gates.nonzero()
        pairs = pairs[pairs[:, 1].argsort(stable=True)]
        self.tokens, self.experts = pairs[:, 0], pairs[:, 1]
        self.sizes = (gates != 0).sum(0).tolist()
        self.weights = gates[self.tokens, self.experts].unsqueeze(1)


class Noisy(nn.Module):
    """A router with noise where it is trained, the losses of its loads, and experts on the rows of `pairs`."""

    pairs_of = Pairs
    expert_of = Mlp

    def __init__(self):
        super().__init__()
        self.router = nn.Parameter(torch.randn(H, E))
        self.noise = nn.Parameter(torch.randn(H, E) * 0.1)
        self.experts = nn.ModuleList(self.expert_of() for _ in range(E))

    def gate(self, x):
        clean = x @ self.router
        logits = clean
        if self.training:
            logits = clean + torch.randn_like(clean) * (F.softplus(x @ self.noise) + 1e-2)
        best, ids = logits.softmax(1).topk(K + 1, dim=1)
        best, ids = best[:, :K], ids[:, :K]
        zeros = torch.zeros_like(logits, requires_grad=True)
        return zeros.scatter(1, ids, best / (best.sum(1, keepdim=True) + 1e-6))

    def even(self, load):
        return load.float().var() / (load.float().mean() ** 2 + 1e-10)

    def forward(self, x):
        gates = self.gate(x)
        loss = self.even(gates.sum(0)) + self.even((gates > 0).sum(0))
        return self.mixed(x, gates) + loss * 1e-2

    def mixed(self, x, gates):
        pairs = Pairs(gates)
        parts = pairs.out(x)
        return pairs.back([self.experts[i](parts[i]) for i in range(E)])


class Unweighted(Noisy):
    """Rows that are added up as they are."""

    def mixed(self, x, gates):
        pairs = Pairs(gates)
        parts, _unused = pairs.out(x), pairs.weights_of()
        return pairs.back([self.experts[i](parts[i]) for i in range(E)], weighted=False)


class WeightedInside(Noisy):
    """Each chunk's gates meet its expert's results before they are joined."""

    def mixed(self, x, gates):
        pairs = Pairs(gates)
        parts = [f(rows) * w for f, rows, w in zip(self.experts, pairs.out(x), pairs.weights_of(), strict=True)]
        return pairs.back(parts, weighted=False)


class Sorted(Noisy):
    """A list that is put in expert order as a whole."""

    def mixed(self, x, gates):
        pairs = Kept(gates)
        found = {i: self.experts[i](rows) for i, rows in enumerate(pairs.out(x))}
        return pairs.back(list(found.values()))


class Soft(nn.Module):
    """An expert whose results are a softmax."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, WIDTH), nn.Linear(WIDTH, H)

    def forward(self, x):
        return self.down(self.up(x).relu()).softmax(1)


class SoftExperts(Noisy):
    """Experts that keep their own code."""

    expert_of = Soft


class Exponentials(Noisy):
    """The log of a sum of exponentials."""

    def mixed(self, x, gates):
        pairs = LogPairs(gates)
        parts = pairs.out(x)
        return pairs.back([self.experts[i](parts[i]) for i in range(E)])


def _named(kind: type[nn.Module]) -> Spelling:
    return Spelling(kind.__name__, "P7", kind, tokens)


SPELLINGS = tuple(map(_named, (Noisy, Unweighted, WeightedInside, Sorted, SoftExperts, Exponentials)))


class Near(Noisy):
    """Gates without noise, and what is near."""

    def __init__(self):
        super().__init__()
        self.eval()

    def forward(self, x):
        return self.mixed(x, self.gate(x))


class TokensSorted(Near):
    """Rows go to the experts in the order of the tokens, cut by the experts' counts."""

    def mixed(self, x, gates):
        pairs = torch.nonzero(gates)
        tokens = pairs.sort(0)[0][:, 0]
        parts = torch.split(x[tokens], (gates > 0).sum(0).tolist())
        rows = torch.cat([f(rows) for f, rows in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(x).index_add(0, tokens, rows)


class OtherOrder(Near):
    """Chunks are joined in another order than they were cut in."""

    def mixed(self, x, gates):
        pairs = Pairs(gates)
        parts = [f(rows) for f, rows in zip(self.experts, pairs.out(x), strict=True)]
        return pairs.back([parts[1], parts[0], *parts[2:]])


class OtherGates(Near):
    """Gates are read at the next expert."""

    def mixed(self, x, gates):
        pairs = Pairs(gates)
        weights = torch.gather(gates[pairs.tokens], 1, (pairs.experts + 1) % E)
        return torch.zeros_like(x).index_add(0, pairs.tokens, torch.cat(self.run(pairs, x)) * weights)

    def run(self, pairs, x):
        return [f(rows) for f, rows in zip(self.experts, pairs.out(x), strict=True)]


class OneUnlike(Near):
    """The last expert's rows are doubled."""

    def mixed(self, x, gates):
        pairs = Pairs(gates)
        parts = [f(rows) for f, rows in zip(self.experts, pairs.out(x), strict=True)]
        return pairs.back([*parts[:-1], parts[-1] * 2])


NEAR = (TokensSorted, OtherOrder, OtherGates, OneUnlike)
