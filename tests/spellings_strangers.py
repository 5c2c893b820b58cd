"""Ways to write MoE layers that were written by strangers to moec, without a look at how it matches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import WIDTH, E, H, K, Mlp, Spelling, tokens
from torch import nn


class Chosen(nn.Module):
    """A router with top-k probabilities, and a list of experts."""

    expert = Mlp

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(self.expert() for _ in range(E))

    def choose(self, x):
        """Renormalised weights[T, k] and experts[T, k]."""
        w, chosen = F.softmax(self.router(x), dim=-1).topk(K, dim=-1)
        return w / w.sum(-1, keepdim=True), chosen


class ChosenOnce(Chosen):
    """One expert a token."""

    def choose(self, x):
        """Probabilities[T] and experts[T]."""
        return F.softmax(self.router(x), dim=-1).max(dim=-1)


class HistogramSplit(nn.Module):
    """Weights of all experts in one matrix; `histc` up to E; chunks of rows beside chunks of weights."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.weight1 = nn.Parameter(torch.randn(H, E * 2 * WIDTH) * 0.2)
        self.weight2 = nn.Parameter(torch.randn(E * WIDTH, H) * 0.2)

    def forward(self, x):
        logits, chosen = torch.topk(self.router(x), k=K, dim=1)
        probs = torch.softmax(logits, dim=-1)
        order = torch.argsort(chosen.view(-1), stable=True)
        rows = x.index_select(0, order // K)
        counts = torch.histc(chosen.float(), bins=E, min=0, max=E)
        ups, downs = self.weight1.view(E, H, -1), self.weight2.view(E, -1, H)
        outs = []
        for up, down, part in zip(ups, downs, torch.split(rows, counts.long().tolist()), strict=True):
            a, b = torch.chunk(part @ up, 2, dim=-1)
            outs.append((F.silu(a) * b) @ down)
        y = torch.cat(outs)
        back = torch.zeros(K * x.shape[0], H, dtype=y.dtype).index_copy_(0, order, y)
        return (back.reshape(-1, K, H) * probs.unsqueeze(-1)).sum(dim=1)


class BlockMeans(Chosen):
    """Scores are means of blocks of channels; each token's one row is written, not added."""

    def forward(self, x):
        scores = F.relu(x.view(x.shape[0], E, H // E).mean(-1))
        w, chosen = scores.softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = torch.nonzero(chosen == e).squeeze(-1)
            y[rows] = w[rows].unsqueeze(-1) * expert(x[rows])
        return y


class HashedIds(Chosen):
    """A fixed table says each token id's expert; nothing is weighted."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randint(0, E, (50,)))

    def forward(self, x):
        chosen = self.table[(x[:, 0] * 7).long().remainder(50)]
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            y[mine] = expert(x[mine])
        return y


class WhereOnAll(Chosen):
    """Every expert on every token, times its weight where it was chosen."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = 0
        for e, expert in enumerate(self.experts):
            mine = torch.where(chosen == e, w, torch.zeros_like(w)).sum(-1, keepdim=True)
            y = y + mine * expert(x)
        return y


class PartsByName(nn.Module):
    """An expert is a dictionary of layers; rows by the columns of `nonzero`."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"linear": nn.Linear(H, WIDTH), "gate": nn.Linear(H, WIDTH), "out": nn.Linear(WIDTH, H)})
            for _ in range(E)
        )

    def forward(self, x):
        w, chosen = torch.topk(F.softmax(self.router(x), dim=1), K, dim=-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            places = (chosen == e).nonzero(as_tuple=False)
            token, slot = places[:, 0], places[:, 1]
            rows = x.index_select(0, token)
            rows = expert["out"](F.gelu(expert["linear"](rows)) * expert["gate"](rows))
            y = y.index_add(0, token, rows * w[token, slot].unsqueeze(-1))
        return y


class ListedRows(Chosen):
    """Rows as lists of Python numbers that only index."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        mask = F.one_hot(chosen, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            slot, token = torch.where(mask[e])
            if token.shape[0] == 0:
                continue
            token_list = token.tolist()
            slot_list = slot.tolist()
            rows = self.experts[e](x[None, token_list].reshape(-1, H)) * w[token_list, slot_list, None]
            y.index_add_(0, token, rows)
        return y


class Dropping(nn.Sequential):
    """An expert with dropout."""

    def __init__(self):
        super().__init__(nn.Linear(H, WIDTH), nn.ReLU(), nn.Dropout(0.1), nn.Linear(WIDTH, H), nn.Dropout(0.1))


class ExpertsWithDropout(Chosen):
    """Experts that drop nothing in evaluation."""

    expert = Dropping

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            y[token] += w[token, slot, None] * expert(x[token])
        return y


class ByWholeRows(Chosen):
    """Tokens gathered and added back by an index as wide as a row."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            wide = token.reshape(-1, 1).expand(-1, H)
            y.scatter_add_(0, wide, expert(torch.gather(x, 0, wide)) * w[token, slot].reshape(-1, 1))
        return y


class NamedResults(Chosen):
    """One name for counts, their sum and what numpy holds; a list and its start bound at once."""

    def forward(self, x):
        w, chosen = self.choose(x)
        counts = chosen.new_zeros((chosen.shape[0], E))
        counts.scatter_(1, chosen, 1)
        counts = counts.sum(dim=0)
        order = chosen.view(-1).argsort()
        rows = x[order // K]
        counts = counts.cpu().numpy()
        outs, start = [], 0
        for i, count in enumerate(counts):
            end = start + count
            if count == 0:
                continue
            expert = self.experts[i]
            result = expert(rows[start:end])
            outs.append(result)
            start = end
        joined = torch.cat(outs, dim=0) if len(outs) else rows.new_empty(0)
        back = torch.empty_like(joined)
        back[order] = joined
        return (back.view(*chosen.shape, -1) * w.unsqueeze(-1)).sum(dim=1)


class CountsByAdding(Chosen):
    """Counts are ones added at the choices; tokens are repeated before they are sorted."""

    def forward(self, x):
        w, chosen = self.choose(x)
        ids = chosen.view(-1)
        order = torch.argsort(ids, stable=True)
        counts = torch.zeros(E, dtype=torch.long).scatter_add_(0, ids, torch.ones_like(ids)).tolist()
        rows = x.repeat_interleave(K, dim=0)[order]
        outs, start = [], 0
        for i, expert in enumerate(self.experts):
            size = counts[i]
            outs.append(expert(rows[start : start + size]))
            start += size
        y = torch.cat(outs, 0)
        back = torch.empty_like(y)
        back[order] = y
        return (back.view(-1, K, H) * w.unsqueeze(-1)).sum(1)


class DistinctChoices(Chosen):
    """A loop over the distinct values of the choices."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in torch.unique(chosen):
            token, slot = torch.where(chosen == e)
            y.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return y


class FirstOfRank(Chosen):
    """Experts are looked up at a place that begins where a rank's own begin: at 0 on one machine."""

    rank = 0

    def forward(self, x):
        w, chosen = self.choose(x)
        order = chosen.view(-1).argsort()
        rows, counts = x[order // K], torch.bincount(chosen.view(-1), minlength=E).cpu().numpy()
        outs, start = [], 0
        for i, count in enumerate(counts):
            end = start + count
            if count == 0:
                continue
            outs.append(self.experts[i + self.rank * len(self.experts)](rows[start:end]))
            start = end
        y = torch.empty(len(order), H)
        y[order] = torch.cat(outs)
        return (y.view(-1, K, H) * w.unsqueeze(-1)).sum(1)


class WeightsByMask(Chosen):
    """A token's weight is picked by the mask that picks the token; experts have names."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleDict({f"ffn_{e}": self.expert() for e in range(E)})

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, name in enumerate(self.experts):
            mine = chosen == e
            rows = mine.any(-1)
            y[rows] = y[rows] + self.experts[name](x[rows]) * w[mine].unsqueeze(-1)
        return y


SPELLINGS = (
    Spelling("HistogramSplit", "P7", HistogramSplit, tokens),
    Spelling("BlockMeans", "P1", BlockMeans, tokens),
    Spelling("HashedIds", "P1", HashedIds, tokens),
    Spelling("WhereOnAll", "P9", WhereOnAll, tokens),
    Spelling("PartsByName", "P2", PartsByName, tokens),
    Spelling("ListedRows", "P2", ListedRows, tokens),
    Spelling("ByWholeRows", "P1", ByWholeRows, tokens),
    Spelling("NamedResults", "P7", NamedResults, tokens),
    Spelling("CountsByAdding", "P7", CountsByAdding, tokens),
    Spelling("DistinctChoices", "P2", DistinctChoices, tokens),
    Spelling("FirstOfRank", "P7", FirstOfRank, tokens),
    Spelling("WeightsByMask", "P1", WeightsByMask, tokens),
)


class LastWins(Chosen):
    """Near miss: two experts a token, and the last one's row overwrites the other's."""

    def forward(self, x):
        w, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            y[token] = w[token, slot, None] * expert(x[token])
        return y


class KeepsOthers(Chosen):
    """At most one expert a token, whose row replaces what was there before; others keep that."""

    def forward(self, x):
        w, chosen = F.softmax(self.router(x), dim=-1).max(-1)
        chosen = torch.where(w > 0.3, chosen, -1)
        y = x.clone()
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            y[mine] = w[mine].unsqueeze(-1) * expert(x[mine])
        return y


class IdlePlaces(Chosen):
    """Near miss: `histc` up to E counts rows of no expert (id E) with those of the last one."""

    def forward(self, x):
        w, chosen = self.choose(x)
        chosen = chosen.masked_fill(w < 0.4, E)
        ids = chosen.view(-1)
        order = torch.argsort(ids, stable=True)
        counts = torch.histc(ids.float(), bins=E, min=0, max=E).long().tolist()
        rows = x[order // K]
        outs, start = [], 0
        for i, expert in enumerate(self.experts):
            outs.append(expert(rows[start : start + counts[i]]))
            start += counts[i]
        y = torch.cat(outs, 0)
        back = torch.zeros_like(y)
        back[order] = y
        return (back.view(-1, K, H) * w.unsqueeze(-1)).sum(1)


class DistinctOfDropped(Chosen):
    """The distinct values hold −1, which is the last expert, for tokens that chose none."""

    def forward(self, x):
        w, chosen = self.choose(x)
        chosen = torch.where(w > 0.55, chosen, -1)
        y = torch.zeros_like(x)
        for e in torch.unique(chosen):
            token, slot = torch.where(chosen == e)
            y.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return y


class MaskOfTwice(Chosen):
    """Near miss: a token may choose an expert twice, so its mask has more weights than the token has rows."""

    def forward(self, x):
        w, chosen = self.choose(x)
        chosen = chosen // 2
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            rows = mine.any(-1)
            y[rows] = y[rows] + expert(x[rows]) * (w * mine).sum(-1)[rows].unsqueeze(-1).sqrt()
        return y


NEAR = (LastWins, IdlePlaces, DistinctOfDropped, MaskOfTwice)
