"""Near misses of loops whose experts take the first C of their rows: they drop others, or none, and stay loops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, Mlp
from spellings_firsts import FirstRows, OneChoice
from torch import nn


class LastRows(FirstRows):
    """Near miss: all but the last C."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            token, slot = token[:-2], slot[:-2]
            y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


class FromTheSecond(FirstRows):
    """Near miss: rows from the second on."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            token, slot = token[1:4], slot[1:4]
            y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


class OneForAll(OneChoice):
    """Near miss: an expert's first row is what all of its tokens get."""

    def forward(self, x):
        _, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = torch.where(chosen == e)[0]
            y[rows] = expert(x[rows])[:1].sum(0)
        return y


class OtherLimit(FirstRows):
    """Near miss: more than one number of rows are cut to another."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            if len(token) > 4:
                token, slot = token[:2], slot[:2]
            y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


class CutTwice(FirstRows):
    """Near miss: what was cut for its rows is cut again."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            token, slot = token[:5], slot[:5]
            h = expert(x[token])[:3] * w[token, slot, None][:3]
            y.index_add_(0, token[:3], h)
        return y


class CountsElements(OneChoice):
    """Near miss: what is compared with C are numbers, not rows."""

    def forward(self, x):
        _, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = torch.where(chosen == e)[0]
            kept = x[rows]
            if kept.numel() > 40:
                rows = rows[:40]
            y[rows] = expert(x[rows])
        return y


class AtRandom(OneChoice):
    """Near miss: who is kept is drawn."""

    def forward(self, x):
        _, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = torch.where(chosen == e)[0]
            if len(rows) > 2:
                rows = rows[torch.randperm(len(rows))[:2]]
            y[rows] = expert(x[rows])
        return y


class SortedFirst(FirstRows):
    """Near miss: runs of a sort that says nothing of equal ids; which rows come first is the sort's."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        order = chosen.view(-1).argsort()
        ends = torch.bincount(chosen.view(-1), minlength=E).cumsum(0).tolist()
        y, start = torch.zeros_like(x), 0
        for e, end in enumerate(ends):
            pairs = order[start:end][:2]
            token, slot = pairs // self.k, pairs % self.k
            y.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
            start = end
        return y


class StaleCount(FirstRows):
    """Near miss: the number of rows is of before they became twice as many."""

    def forward(self, x):
        w, chosen = F.softmax(self.gate(x), dim=-1).topk(self.k, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            count = token.shape[0]
            token, slot = torch.cat([token, token]), torch.cat([slot, slot])
            if count > 4:
                token, slot = token[:4], slot[:4]
            y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


class KeptTwice(FirstRows):
    """Near miss: the kept are weighted by a token's every slot, and it may name an expert twice."""

    def forward(self, x):
        w = F.softmax(self.gate(x), dim=-1)[:, :2]
        chosen = (x[:, :2] > 0).long()
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            hit = chosen == e
            rows = torch.where((hit & (x[:, 2:4] > 0)).any(-1))[0]
            y[rows] += expert(x[rows]) * (w[rows] * (chosen[rows] == e)).sum(-1, keepdim=True)
        return y


NEAR = (LastRows, FromTheSecond, OneForAll, OtherLimit, CutTwice, CountsElements, SortedFirst, StaleCount, KeptTwice)
UNROLLED = (AtRandom, OtherLimit, CountsElements, StaleCount)


class NormedExpert(Mlp):
    """An expert with code of its own."""

    def forward(self, x):
        return self.down(F.layer_norm(self.up(x), (WIDTH,)))


class CutOfOwnCode(FirstRows):
    """Left as it was: experts that run their own code, of which some rows are dropped."""

    def __init__(self, factor=1.0):
        super().__init__(factor)
        self.experts = nn.ModuleList(NormedExpert() for _ in range(E))
