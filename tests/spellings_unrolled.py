"""Rows of each expert held in lists, dictionaries and objects, over several loops that are traced as they stand."""

from __future__ import annotations

import torch
from spelling import E, Spelling, tokens
from spellings_strangers import Chosen
from torch import nn


class Switched(Chosen):
    """One expert a token: rows in a list that three loops read, results in another, counts of rows returned."""

    def forward(self, x):
        w, chosen = self.router(x).softmax(-1).max(-1)
        rows = [torch.eq(chosen, e).nonzero(as_tuple=True)[0] for e in range(E)]
        y = x.new_zeros(x.shape)
        loads = x.new_tensor([len(rows[e]) for e in range(E)])
        done = [self.experts[e](x[rows[e], :]) for e in range(E)]
        for e in range(E):
            y[rows[e], :] = done[e]
        return y * w.view(-1, 1) + loads.sum() * 0.01


class ByName(Chosen):
    """Rows, slots and results by the experts' numbers."""

    def forward(self, x):
        w, chosen = self.choose(x)
        rows = {e: torch.where(chosen == e) for e in range(E)}
        done = {}
        for e, (t, s) in rows.items():
            done[e] = self.experts[e](x[t]) * w[t, s, None]
        y = torch.zeros_like(x)
        for e in rows:
            y.index_add_(0, rows[e][0], done[e])
        return y


class Planned(Chosen):
    """Rows, parts and weights each in a list of their own."""

    def forward(self, x):
        w, chosen = self.choose(x)
        rows = [torch.where(chosen == e) for e in range(E)]
        taken, weights = [x[t] for t, _ in rows], [w[t, s].unsqueeze(-1) for t, s in rows]
        done = [f(part) for f, part in zip(self.experts, taken, strict=True)]
        y = torch.zeros_like(x)
        for (t, _), part, weight in zip(rows, done, weights, strict=True):
            y[t] += part * weight
        return y


class Plan:
    """Who goes where."""

    def __init__(self, chosen):
        self.rows = [torch.where(chosen == e) for e in range(E)]

    def taken(self, x):
        return [x[t] for t, _ in self.rows]


class ByPlan(Chosen):
    """An object that knows the rows."""

    def forward(self, x):
        w, chosen = self.choose(x)
        plan = Plan(chosen)
        done = [f(part) for f, part in zip(self.experts, plan.taken(x), strict=True)]
        y = torch.zeros_like(x)
        for (t, s), part in zip(plan.rows, done, strict=True):
            y.index_add_(0, t, part * w[t, s].unsqueeze(-1))
        return y


def _named(kind: type[nn.Module]) -> Spelling:
    return Spelling(kind.__name__, "P1", kind, tokens)


SPELLINGS = tuple(map(_named, (Switched, ByName, Planned, ByPlan)))


class NextRows(Chosen):
    """What an expert made is written to the next one's rows, as many of them as there are."""

    def forward(self, x):
        _, chosen = self.router(x).softmax(-1).max(-1)
        rows = [(chosen == e).nonzero(as_tuple=True)[0] for e in range(E)]
        done = [self.experts[e](x[rows[e], :]).sum(0) for e in range(E)]
        y = torch.zeros_like(x)
        for e in range(E):
            y[rows[e], :] = done[(e + 1) % E]
        return y


class OneAfterOther(Chosen):
    """Two experts a token: the later one reads what the earlier one wrote."""

    def forward(self, x):
        _, chosen = self.choose(x)
        rows = [torch.where(chosen == e)[0] for e in range(E)]
        y = x.clone()
        for e in range(E):
            y[rows[e]] = self.experts[e](y[rows[e]])
        return y


class AllReadFirst(Chosen):
    """Two experts a token: all read before one writes, and the last one wins."""

    def forward(self, x):
        _, chosen = self.choose(x)
        rows = [torch.where(chosen == e)[0] for e in range(E)]
        y = x.clone()
        done = [self.experts[e](y[rows[e]]) for e in range(E)]
        for e in range(E):
            y[rows[e]] = done[e]
        return y


class OneMore(Chosen):
    """One of the experts is told apart."""

    def forward(self, x):
        w, chosen = self.router(x).softmax(-1).max(-1)
        rows = [(chosen == e).nonzero(as_tuple=True)[0] for e in range(E)]
        done = [self.experts[e](x[rows[e]]) for e in range(E)]
        done[1] = done[1] + 1
        y = torch.zeros_like(x)
        for e in range(E):
            y[rows[e]] = done[e]
        return y * w[:, None]


class WithoutGradient(Chosen):
    """The second half of the experts is told to have no gradient."""

    def forward(self, x):
        _, chosen = self.router(x).softmax(-1).max(-1)
        rows = [(chosen == e).nonzero(as_tuple=True)[0] for e in range(E)]
        done = [self.experts[e](x[rows[e]]) for e in range(E // 2)]
        with torch.no_grad():
            done += [self.experts[e](x[rows[e]]) for e in range(E // 2, E)]
        y = torch.zeros_like(x)
        for e in range(E):
            y[rows[e]] = done[e]
        return y + self.router(x).sum()


NEAR = (NextRows, OneAfterOther, AllReadFirst, OneMore)
