"""Layers without a loop over experts, as strangers to moec wrote them: views, fills and counts in other places."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K, Spelling, batches, groups, tokens
from spellings_letters import Banked
from torch import nn


class TokensSplitBehind(Banked):
    """Every expert on every token; results and gates are split to [E, B, S, …] before they are summed."""

    def more(self):
        self.up_bias, self.down_bias = nn.Parameter(torch.randn(E, WIDTH)), nn.Parameter(torch.randn(E, H))

    def gates(self, w, chosen, b):
        """w[B·S, k] scattered to gates[E, B, S]."""
        gates = w.new_zeros(w.shape[0], E).scatter_(1, chosen, w)
        return gates.transpose(0, 1).view(E, b, -1)

    def forward(self, x):
        b, s, h = x.shape
        x = x.reshape(-1, h)
        w, chosen = self.choose(x)
        rows = torch.bmm(x.repeat(E, 1).view(E, -1, h), self.up) + self.up_bias[:, None]
        y = torch.bmm(F.relu(rows), self.down) + self.down_bias[:, None, :]
        return (y.view(E, b, s, h) * self.gates(w, chosen, b)[..., None]).sum(0)


class TurnedThenSquashed(Banked):
    """One expert a token; its score alone is not −∞, is turned, and then made a gate, which weighs what goes in."""

    def forward(self, x):
        logits = self.router(x)
        best, chosen = logits.topk(1, 1)
        gates = torch.full_like(logits, float("-inf")).scatter_(1, chosen, best).transpose(0, 1)
        gates = torch.sigmoid(gates.float()).to(x.dtype)
        every = torch.arange(x.shape[0]).view(1, -1).expand(E, -1).reshape(-1, 1).expand(-1, H)
        rows = torch.gather(x, 0, every) * gates.reshape(-1, 1)
        y = torch.bmm(F.silu(torch.bmm(rows.view(E, -1, H), self.up)), self.down)
        return torch.zeros_like(x).scatter_add_(0, every, y.view(-1, H))


class CountedRuns(Banked):
    """Sorted rows and grouped products, whose ends are sums of a `bincount`."""

    def forward(self, x):
        w, chosen = self.choose(x)
        flat = chosen.view(-1)
        order = flat.argsort()
        ends = torch.bincount(flat, minlength=E).cumsum(0).to(torch.int32)
        y = groups(F.relu(groups(x[order // K], self.up, ends)), self.down, ends)
        return torch.zeros_like(x).index_add(0, order // K, y * w.view(-1)[order][:, None])


class LoadCounted(Banked):
    """Gathered matrices; a loss and a buffer of how often experts are chosen, by `bincount`."""

    def more(self):
        self.register_buffer("load", torch.zeros(E, dtype=torch.long))

    def forward(self, x):
        w, chosen = self.choose(x)
        counts = torch.bincount(chosen.flatten(), minlength=E)
        self.load += counts
        loss = (counts.float() / chosen.numel() * F.softmax(self.router(x), dim=-1).mean(0)).sum() * E
        rows = torch.einsum("th,tkhf->tkf", x, self.up[chosen]).relu()
        return torch.einsum("tkf,tkfh,tk->th", rows, self.down[chosen], w), loss


class PairsOfWeight(Banked):
    """Pairs are those of enough weight; their tokens, experts and weights are read at the mask's places."""

    def forward(self, x):
        w, chosen = F.softmax(self.router(x), dim=-1).topk(K, dim=-1)
        token, slot = (w > 0.2).nonzero(as_tuple=True)
        expert = chosen[token, slot]
        rows = torch.einsum("nh,nhf->nf", x[token], self.up[expert]).relu()
        rows = torch.einsum("nf,nfh->nh", rows, self.down[expert]) * w[token, slot, None]
        return torch.zeros_like(x).index_add(0, token, rows)


class OneMoreThanChosen(Banked):
    """A top-k of one more than are chosen, of which all but the last are; loads are how many gates are above 0."""

    def forward(self, x):
        logits = self.router(x)
        best, index = logits.topk(K + 1, dim=1)
        gates = torch.zeros_like(logits).scatter(1, index[:, :K], best[:, :K].softmax(1))
        every = torch.stack([F.relu(x @ self.up[e]) @ self.down[e] for e in range(E)], 1)
        return (gates.unsqueeze(1) @ every).squeeze(1), (gates > 0).sum(0).float().var()


class KeptAxisOfGates(Banked):
    """Gates times results is a product of matrices, with an axis of size 1 behind two of tokens."""

    def forward(self, x):
        scores = self.router(x).sigmoid()
        w, chosen = scores.topk(K, -1)
        gates = torch.zeros_like(scores).scatter(-1, chosen, w / (w.sum(-1, keepdim=True) + 1e-9))
        rows = torch.tensordot(x, self.up, dims=([2], [1])).relu()
        every = torch.einsum("btef,efh->bteh", rows, self.down)
        return torch.matmul(gates.unsqueeze(2), every).squeeze(2)


class SpareSeat(Banked):
    """A table [E, C + 1, H], whose last seats take the dropped and are cut off; rows come back from zeros there."""

    least, factor = 2, 0.6

    def seats(self, place, most):
        return place.clamp(max=most)

    def experts(self, rows):
        return torch.bmm(F.gelu(torch.bmm(rows, self.up)), self.down)

    def forward(self, x):
        most = max(self.least, int(self.factor * x.shape[0] * K / E))
        w, chosen = self.choose(x)
        flat = chosen.reshape(-1)
        hot = F.one_hot(flat, E)
        place = ((hot.cumsum(0) - 1) * hot).sum(-1)
        table = x.new_zeros(E, most + 1, H)
        table[flat, self.seats(place, most)] = x.repeat_interleave(K, 0)
        y = self.back(table, flat, place, most) * self.kept(place, most)[:, None]
        return (y.view(-1, K, H) * w[..., None]).sum(1)

    def kept(self, place, most):
        return place < most

    def back(self, table, flat, place, most):
        y = self.experts(table[:, :most])
        return torch.cat([y, y.new_zeros(E, 1, H)], 1)[flat, self.seats(place, most)]


class SpareSeatCut(SpareSeat):
    """The table is cut by −1; rows of the dropped come back from the last seat that is left, and weigh nothing."""

    def back(self, table, flat, place, most):
        return self.experts(table[:, :-1])[flat, place.clamp(max=most - 1)]


class SpareSeatKept(SpareSeat):
    """Near miss: the experts run on the last seats too, which the dropped share."""

    def kept(self, place, most):
        return place <= most

    def back(self, table, flat, place, most):
        return self.experts(table)[flat, self.seats(place, most)]


class FirstSeatCut(SpareSeatCut):
    """Near miss: the first seats are cut off in place of the last."""

    def back(self, table, flat, place, most):
        return self.experts(table[:, 1:])[flat, place.clamp(max=most - 1)]


class OneMoreKept(SpareSeat):
    """Near miss: who is on the last seat, which is cut off, counts as kept; no row but zeros is there."""

    def kept(self, place, most):
        return place <= most


class OtherSeats(SpareSeat):
    """Near miss: the dropped are put on the last seat that is left."""

    def seats(self, place, most):
        return place.clamp(max=most - 1)


class ChosenAgain(Banked):
    """Near miss: the slots that are left may name an expert twice, and a scatter keeps one of them."""

    def forward(self, x):
        logits = self.router(x)
        best, index = logits.topk(K, dim=1)
        index, best = torch.cat([index[:, :1], index], 1)[:, :K], best * torch.tensor([1.0, 0.5])
        gates = torch.zeros_like(logits).scatter(1, index, best)
        every = torch.stack([F.relu(x @ self.up[e]) @ self.down[e] for e in range(E)], 1)
        return (gates.unsqueeze(1) @ every).squeeze(1)


class AsksHowManyCounts(Banked):
    """How many counts there are decides what is done: Dynamo breaks the graph there."""

    def forward(self, x):
        w, chosen = self.choose(x)
        if torch.bincount(chosen.flatten()).shape[0] < E:
            x = x * 2
        rows = torch.einsum("th,tkhf->tkf", x, self.up[chosen]).relu()
        return torch.einsum("tkf,tkfh,tk->th", rows, self.down[chosen], w)


class GatesOfOthers(TokensSplitBehind):
    """Near miss: gates are of the token at the other place, [S, B]."""

    def gates(self, w, chosen, b):
        gates = w.new_zeros(w.shape[0], E).scatter_(1, chosen, w)
        return gates.view(b, -1, E).permute(2, 1, 0).reshape(E, b, -1)


class OtherFill(TurnedThenSquashed):
    """Near miss: the score of the others is 0, of which a gate of a half is made."""

    def forward(self, x):
        logits = self.router(x)
        best, chosen = logits.topk(1, 1)
        gates = torch.sigmoid(torch.zeros_like(logits).scatter_(1, chosen, best).transpose(0, 1))
        rows = x.repeat(E, 1) * gates.reshape(-1, 1)
        y = torch.bmm(F.silu(torch.bmm(rows.view(E, -1, H), self.up)), self.down)
        return y.sum(0)


def _examples(spelling, kinds, inputs=tokens):
    return tuple(Spelling(kind.__name__, spelling, kind, inputs) for kind in kinds)


SPELLINGS = (
    *_examples("P6", (TokensSplitBehind, KeptAxisOfGates), batches),
    *_examples("P6", (TurnedThenSquashed, OneMoreThanChosen)),
    *_examples("P8", (SpareSeat, SpareSeatCut)),
    *_examples("P4", (CountedRuns,)),
    *_examples("P12", (LoadCounted,)),
)
NEAR = (
    (GatesOfOthers, batches),
    *((kind, tokens) for kind in (OtherFill, ChosenAgain, SpareSeatKept, FirstSeatCut, OneMoreKept, OtherSeats)),
)
