"""Layers that guard against experts that no token can choose: dead comparisons, clamps and masks, and near misses.

What a library keeps for a model that is spread over devices: an id that is no expert's here, and what is done about it.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K, Spelling, groups, tokens
from torch import Tensor, nn


class Guarded(nn.Module):
    """A softmax router over stacked experts; `bias`: with biases; limit: the first id that is taken for no expert's."""

    limit, fill = E, 0.0

    def __init__(self, bias=False):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.up, self.down = (
            nn.Parameter(torch.randn(E, H, 2 * WIDTH) * 0.2),
            nn.Parameter(torch.randn(E, WIDTH, H) * 0.2),
        )
        self.up_bias = nn.Parameter(torch.randn(E, 2 * WIDTH)) if bias else None
        self.down_bias = nn.Parameter(torch.randn(E, H)) if bias else None

    def route(self, x):
        """weights[T, k] and experts[T, k]."""
        w, chosen = F.softmax(self.router(x), dim=-1).topk(K, dim=-1)
        return w / w.sum(-1, keepdim=True), chosen

    def forward(self, x):
        w, chosen = self.route(x)
        return self.experts(x, w, chosen)


@torch.library.custom_op("moec_spellings::groups_of_some", mutates_args=())
def groups_of_some(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Rows up to ends[e] times w[e]; zeros for the rows behind the last end."""
    y = x.new_zeros(x.shape[0], w.shape[2])
    for e, (a, b) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        y[a:b] = x[a:b] @ w[e]
    return y


@groups_of_some.register_fake
def _(x, w, ends):
    return x.new_empty(x.shape[0], w.shape[2])


def _backward(ctx, grad):
    x, w, ends = ctx.saved_tensors
    dx, dw = torch.zeros_like(x), torch.zeros_like(w)
    for e, (a, b) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        dx[a:b], dw[e] = grad[a:b] @ w[e].t(), x[a:b].t() @ grad[a:b]
    return dx, dw, None


groups_of_some.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def glu(h):
    a, b = h.chunk(2, dim=-1)
    return F.silu(a) * b


class SkippedSentinel(Guarded):
    """A loop over the experts that are hit, of which one that there is not would be passed over."""

    def experts(self, x, w, chosen):
        y = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(chosen, num_classes=E).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in hit:
            e = e[0]
            if e == self.limit:
                continue
            slot, token = torch.where(mask[e])
            rows = glu(x[token] @ self.up[e]) @ self.down[e]
            y.index_add_(0, token, rows * w[token, slot, None])
        return y


class SkippedRange(SkippedSentinel):
    """A loop over numbers, which never reach what is passed over."""

    def experts(self, x, w, chosen):
        y = torch.zeros_like(x)
        for e in range(E):
            slot, token = torch.where((chosen == e).t())
            if e >= self.limit:
                continue
            y.index_add_(0, token, glu(x[token] @ self.up[e]) @ self.down[e] * w[token, slot, None])
        return y


class MaskedGroups(Guarded):
    """Sorted groups: ids are clamped in place, rows beyond are filled in before, between and after the products."""

    def experts(self, x, w, chosen):
        ids, order = torch.sort(chosen.reshape(-1))
        rows = x[order // K]
        gates = w.reshape(-1)[order]
        ends = torch.cumsum(torch.histc(ids.float(), bins=E, min=0, max=E - 1), dim=0, dtype=torch.int32)
        lost = (ids >= self.limit).unsqueeze(-1)
        ids.clamp_(max=self.limit - 1)
        rows.masked_fill_(lost, 0.0)
        h = groups_of_some(rows, self.up, ends)
        if self.up_bias is not None:
            h = h + self.up_bias[ids]
        y = groups_of_some(glu(h.masked_fill(lost, 0.0)), self.down, ends)
        if self.down_bias is not None:
            y = y + self.down_bias[ids]
        y = y.masked_fill(lost, 0.0) * gates.unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.size(0))
        return y[back].view(-1, K, H).sum(dim=1)


class FilledAfterwards(Guarded):
    """The token of every slot by an expanded `arange`; ids are clamped on both sides, results filled in at the end."""

    def experts(self, x, w, chosen):
        token = torch.arange(x.size(0)).unsqueeze(1).expand(-1, K).reshape(-1)
        ids = chosen.reshape(-1)
        lost = ids >= self.limit
        ids = ids.clamp(0, self.limit - 1)
        h = torch.bmm(x[token].unsqueeze(1), self.up[ids]).squeeze(1)
        if self.up_bias is not None:
            h = h + self.up_bias[ids]
        y = torch.bmm(glu(h).unsqueeze(1), self.down[ids]).squeeze(1)
        if self.down_bias is not None:
            y = y + self.down_bias[ids]
        y = y * w.reshape(-1).unsqueeze(-1)
        y.masked_fill_(lost.unsqueeze(-1), 0.0 if self.fill == 0 else self.fill)
        return y.view(-1, K, H).sum(dim=1)


class ClampedInPlace(FilledAfterwards):
    """Ids that are clamped in the memory of the router's choice, which is two choices put together."""

    def route(self, x):
        scores = F.softmax(self.router(x), dim=-1)
        first = scores.max(dim=-1, keepdim=True)
        second = scores.scatter(-1, first[1], float("-inf")).max(dim=-1, keepdim=True)
        return torch.cat((first[0], second[0]), dim=-1), torch.cat((first[1], second[1]), dim=-1)

    def experts(self, x, w, chosen):
        ids = chosen.reshape(-1)
        ids.clamp_(0, self.limit - 1)
        h = torch.bmm(x.repeat_interleave(K, dim=0).unsqueeze(1), self.up[ids]).squeeze(1)
        y = torch.bmm(glu(h).unsqueeze(1), self.down[ids]).squeeze(1) * w.reshape(-1, 1)
        return y.view(-1, K, H).sum(dim=1)


class ExpandedGroups(Guarded):
    """Rows by an expanded `arange`, then in the order of a sort of the ids."""

    def experts(self, x, w, chosen):
        token = torch.arange(x.size(0)).unsqueeze(1).expand(-1, K).reshape(-1)
        ids = chosen.reshape(-1)
        order = torch.argsort(ids)
        ends = torch.cumsum(torch.histc(ids[order].float(), bins=E, min=0, max=E - 1), dim=0, dtype=torch.int32)
        y = groups(glu(groups(x[token][order], self.up, ends)), self.down, ends) * w.reshape(-1, 1)[order]
        return y[torch.argsort(order)].view(-1, K, H).sum(dim=1)


class GatesOfPairs(Guarded):
    """Gates of all experts, read at the expert of every slot."""

    def route(self, x):
        scores = torch.sigmoid(self.router(x))
        return scores, scores.topk(K, dim=-1)[1]

    def experts(self, x, w, chosen):
        token = torch.arange(x.size(0)).unsqueeze(1).expand(-1, K).reshape(-1)
        ids = chosen.reshape(-1)
        gates = w[token, ids].reshape(-1, 1)
        order = torch.argsort(ids)
        ends = torch.cumsum(torch.histc(ids[order].float(), bins=E, min=0, max=E - 1), dim=0, dtype=torch.int32)
        y = groups(glu(groups(x[token][order], self.up, ends)), self.down, ends) * gates[order]
        return y[torch.argsort(order)].view(-1, K, H).sum(dim=1)


class WideWeights(SkippedSentinel):
    """Weights that are a table of more columns than slots, read by slot."""

    def route(self, x):
        scores = F.softmax(self.router(x), dim=-1)
        return scores.sqrt(), scores.topk(K, dim=-1)[1]


class WhereDead(Guarded):
    """Gathered weights, with `where` and a conjunction that change nothing."""

    def experts(self, x, w, chosen):
        ids = torch.where(chosen < E, chosen, 0)
        w = torch.where((ids >= 0) & (ids < E), w, 0.0)
        h = torch.einsum("th,tkhf->tkf", x, self.up[ids])
        return torch.einsum("tkf,tkfh,tk->th", glu(h), self.down[ids], w)


class Shard(MaskedGroups):
    """Half of the experts that the router knows: the others' pairs have an id that no expert has here, and weight 0."""

    def __init__(self, bias=True):
        super().__init__(bias)
        self.router = nn.Linear(H, 2 * E, bias=False)

    def route(self, x):
        w, chosen = super().route(x)
        here = (chosen >= 2) & (chosen < E + 2)
        return w.masked_fill(~here, 0.0), torch.where(here, chosen - 2, E)


class ShardGathered(Shard, FilledAfterwards):
    """The same by gathered weights."""

    experts = FilledAfterwards.experts

    def route(self, x):
        w, chosen = Guarded.route(self, x)
        return w, torch.where(chosen % 2 == 0, chosen // 2, E)


class ShardUnfilled(ShardGathered):
    """The others' pairs are served by the last expert here: nothing is filled in."""

    experts = ClampedInPlace.experts


class ShardLastFilled(ShardGathered):
    """The last expert's results are filled in as well."""

    limit = E - 1


class LastSkipped(SkippedSentinel):
    """The last expert is passed over."""

    limit = E - 1


class LastMasked(MaskedGroups):
    """The last expert's rows are zeros before, between and after its products; its biases are another's."""

    limit = E - 1


class LastFilled(FilledAfterwards):
    """The last expert's results are filled in, those of another are in its place."""

    limit = E - 1


class WrittenAfterwards(FilledAfterwards):
    """Results of which those of some real experts are filled in in place, and read through the tensor itself."""

    limit, fill = 2, 0.5

    def experts(self, x, w, chosen):
        ids = chosen.reshape(-1)
        h = torch.bmm(x.repeat_interleave(K, dim=0).unsqueeze(1), self.up[ids]).squeeze(1)
        y = torch.bmm(glu(h).unsqueeze(1), self.down[ids]).squeeze(1) * w.reshape(-1, 1)
        y.masked_fill_((ids >= self.limit).unsqueeze(-1), self.fill)
        return y.view(-1, K, H).sum(dim=1)


class LastClamped(ClampedInPlace):
    """The last expert's tokens go to the one before."""

    limit = E - 1


class FirstFilled(FilledAfterwards):
    """Everything but the first expert's results becomes 3."""

    limit, fill = 1, 3.0


class Open(nn.Module):
    """A layer that is given a choice, which may name nobody: what is done about that stays."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, w, chosen):
        return self.layer.experts(x, w, chosen)


def choices(count, most=E + 1):
    """x[T, H], weights[T, k] and ids[T, k], of which some are E: no expert's."""
    seed = torch.Generator().manual_seed(count)
    ids = torch.randint(0, most, (count, K), generator=seed)
    return torch.randn(count, H, generator=seed), torch.rand(count, K, generator=seed), ids


KINDS = (
    SkippedSentinel,
    SkippedRange,
    MaskedGroups,
    FilledAfterwards,
    ClampedInPlace,
    ExpandedGroups,
    GatesOfPairs,
    WideWeights,
    WhereDead,
)
SPELLINGS = (
    *(Spelling(kind.__name__, "P4", kind, tokens) for kind in (*KINDS, Shard, ShardGathered)),
    Spelling("MaskedGroups-bias", "P4", lambda: MaskedGroups(bias=True), tokens),
    Spelling("FilledAfterwards-bias", "P5", lambda: FilledAfterwards(bias=True), tokens),
)
NEAR = (
    LastSkipped,
    LastMasked,
    LastFilled,
    LastClamped,
    FirstFilled,
    WrittenAfterwards,
    ShardUnfilled,
    ShardLastFilled,
)
OPEN = (MaskedGroups, FilledAfterwards, ClampedInPlace)
