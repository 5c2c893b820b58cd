"""Every form of a loop over experts, as modules: Python's ways to count, to name and to sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Expert(nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        self.w1 = nn.Linear(hidden, width, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(hidden, width, bias=False)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, experts=4, hidden=8, width=12, k=2):
        super().__init__()
        self.num_experts, self.k = experts, k
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.make(experts, hidden, width)

    def make(self, experts, hidden, width):
        self.experts = nn.ModuleList(Expert(hidden, width) for _ in range(experts))

    def route(self, x) -> tuple[Tensor, Tensor]:
        w, idx = torch.topk(torch.softmax(self.gate(x), -1), self.k, dim=-1)
        return w / w.sum(-1, keepdim=True), idx


class RangeWhere(Layer):
    def forward(self, x):
        hidden = x.shape[-1]
        w, idx = self.route(x)
        final = torch.zeros((x.shape[0], hidden), dtype=x.dtype, device=x.device)
        expert_mask = F.one_hot(idx, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in range(self.num_experts):
            expert_layer = self.experts[expert_idx]
            slot, top_x = torch.where(expert_mask[expert_idx])
            current_state = x[None, top_x].reshape(-1, hidden)
            current = expert_layer(current_state) * w[top_x, slot, None]
            final.index_add_(0, top_x, current.to(x.dtype))
        return final


class HitRows(Layer):
    def forward(self, x):
        w, idx = self.route(x)
        final = torch.zeros_like(x)
        with torch.no_grad():
            expert_mask = F.one_hot(idx, num_classes=self.num_experts + 1).permute(2, 1, 0)
            expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_idx = expert_idx[0]
            if expert_idx == self.num_experts:
                continue
            slot, token = torch.where(expert_mask[expert_idx])
            current = self.experts[expert_idx](x[token]) * w[token, slot, None]
            final.index_add_(0, token, current.to(final.dtype))
        return final


class HitRowsNotUnwrapped(Layer):
    def forward(self, x):
        w, idx = self.route(x)
        final = torch.zeros_like(x)
        expert_mask = F.one_hot(idx, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(expert_mask[expert_idx].squeeze(0))
            final.index_add_(0, token, self.experts[expert_idx](x[token]) * w[token, slot, None])
        return final


class BooleanMask(Layer):
    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for e in range(self.num_experts):
            mask = (idx == e).any(-1)
            if not mask.any():
                continue
            weight = (w * (idx == e)).sum(-1)
            y[mask] += weight[mask].unsqueeze(-1) * self.experts[e](x[mask])
        return y


class Enumerate(Layer):
    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            t, s = torch.where(idx == i)
            if t.numel() == 0:
                continue
            y[t] += w[t, s, None] * expert(x[t])
        return y


class UniqueTolist(Layer):
    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for e in idx.unique().tolist():
            t, s = torch.where(idx == e)
            y = y.index_add(0, t, w[t, s, None] * self.experts[e](x[t]))
        return y


class TolistBefore(Layer):
    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        hit = idx.flatten().unique().cpu().tolist()
        for e in hit:
            t, s = (idx == e).nonzero(as_tuple=True)
            if len(t) > 0:
                y = torch.index_add(y, 0, t, w[t, s].unsqueeze(-1) * self.experts[e](x[t]))
        return y


class Dict(Layer):
    def make(self, experts, hidden, width):
        self.experts = nn.ModuleDict({f"expert_{i}": Expert(hidden, width) for i in range(experts)})

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for e in range(self.num_experts):
            t, s = torch.where(idx == e)
            if t.shape[0] == 0:
                continue
            y[t] = y[t] + w[t, s, None] * self.experts[f"expert_{e}"](x[t])
        return y


class StackedColumns(Layer):
    def make(self, experts, hidden, width):
        self.up = nn.Parameter(torch.randn(experts, hidden, width) / 3)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) / 3)
        self.bias = nn.Parameter(torch.randn(experts, hidden))

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        dense = torch.zeros(x.shape[0], self.num_experts, dtype=x.dtype).scatter(1, idx, w)
        for e in range(self.num_experts):
            mask = dense[:, e] > 0
            if mask.any():
                rows = mask.nonzero().squeeze(-1)
                h = F.gelu(x[rows] @ self.up[e]) @ self.down[e] + self.bias[e]
                y.scatter_add_(0, rows[:, None].expand(-1, x.shape[1]), h * dense[rows, e, None])
        return y


class ZipOfParts(Layer):
    def make(self, experts, hidden, width):
        self.up = nn.ModuleList(nn.Linear(hidden, width) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(width, hidden) for _ in range(experts))

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        with torch.autocast("cpu", enabled=False):
            for i, (up, down) in enumerate(zip(self.up, self.down)):  # noqa: B905  (a form found in the wild)
                t, s = torch.where(idx == i)
                out = down(F.relu(up(x[t]))) * w[t, s].unsqueeze(-1)
                y = y + torch.zeros_like(x).index_add(0, t, out)
        return y


class ByAttributes(Layer):
    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for e in idx.unique():
            expert = self.experts[e]
            t, s = torch.where(idx == e)
            h = F.silu(expert.w1(x[t])) * F.linear(x[t], expert.w3.weight)
            y.index_put_((t,), expert.w2(h) * w[t, s, None], accumulate=True)
        return y


class PlusEquals(Layer):
    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for e in range(self.num_experts):
            t, s = torch.where(idx == e)
            y += torch.zeros_like(x).index_add_(0, t, self.experts[e](x[t]) * w[t, s, None])
        return y * 2


class Recast(Layer):
    """The sum is cast to what it is already, then added to in place."""

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for e in range(self.num_experts):
            t, s = torch.where(idx == e)
            out = self.experts[e](x[t]) * w[t, s, None]
            y = y.to(out.dtype)
            y.index_add_(0, t, out)
        return y


class Widened(Layer):
    """The sum becomes another dtype in the first iteration."""

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x, dtype=torch.float64)
        for e in range(self.num_experts):
            t, s = torch.where(idx == e)
            y = y.to(x.dtype)
            y.index_add_(0, t, self.experts[e](x[t]) * w[t, s, None])
        return y


class BoundAnew(Layer):
    """The sum is added to in place and then bound to another tensor."""

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for e in range(self.num_experts):
            t, s = torch.where(idx == e)
            y += 0.25
            y = y.index_add(0, t, self.experts[e](x[t]) * w[t, s, None])
        return y


class ParameterLists(Layer):
    def make(self, experts, hidden, width):
        self.up = nn.ParameterList(torch.randn(width, hidden) / 3 for _ in range(experts))
        self.down = nn.ParameterList(torch.randn(hidden, width) / 3 for _ in range(experts))

    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for e in range(0, self.num_experts):
            mask = idx.eq(e)
            if mask.sum().item() == 0:
                continue
            t, s = mask.nonzero(as_tuple=True)
            h = F.relu(F.linear(x[t], self.up[e]))
            y.index_add_(0, t, F.linear(h, self.down[e]) * w[t, s, None])
        return y


class DictNames(Dict):
    def forward(self, x):
        w, idx = self.route(x)
        final = torch.zeros_like(x)
        for i, name in enumerate(self.experts):
            t, slot = torch.where(idx == i)
            final.index_add_(0, t, self.experts[name](x[t]) * w[t, slot, None])
        return final


class NumbersAsNames(Layer):
    def make(self, experts, hidden, width):
        self.experts = nn.ModuleDict({str(i): Expert(hidden, width) for i in range(experts)})

    def forward(self, x):
        w, idx = self.route(x)
        mask = F.one_hot(idx, num_classes=self.num_experts)
        final = torch.zeros_like(x)
        for name, expert in self.experts.items():
            column = mask[:, :, int(name)]
            t, slot = torch.where(column)
            final.index_add_(0, t, expert(x[t]) * w[t, slot, None])
        return final


class KeysOfADict(Dict):
    def forward(self, x):
        w, idx = self.route(x)
        final = torch.zeros_like(x)
        i = 0
        for name in self.experts:
            t, slot = torch.where(idx == i)
            final.index_add_(0, t, self.experts[name](x[t]) * w[t, slot, None])
            i += 1  # noqa: SIM113  the form under test
        return final


class CountedByHand(Layer):
    def forward(self, x):
        w, idx = self.route(x)
        final, i = torch.zeros_like(x), 0
        for expert in self.experts:
            t, slot = torch.where(idx == i)
            if len(t) > 0:
                final.index_add_(0, t, expert(x[t]) * w[t, slot, None])
            i += 1  # noqa: SIM113  the form under test
        return final


class NamedParameters(Layer):
    def make(self, experts, hidden, width):
        up = {f"up{i}": nn.Parameter(torch.randn(hidden, width) * 0.3) for i in range(experts)}
        down = {f"down{i}": nn.Parameter(torch.randn(width, hidden) * 0.3) for i in range(experts)}
        self.matrices = nn.ParameterDict(up | down)

    def forward(self, x):
        w, idx = self.route(x)
        final = torch.zeros_like(x)
        for i in range(self.num_experts):
            t, slot = torch.where(idx == i)
            out = F.relu(x[t] @ self.matrices[f"up{i}"]) @ self.matrices[f"down{i}"]
            final.index_add_(0, t, out * w[t, slot, None])
        return final


class DictValues(Dict):
    def forward(self, x):
        w, idx = self.route(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts.values()):
            t, s = torch.where(idx == i)
            y.index_add_(0, t, expert(x[t]) * w[t, s, None])
        return y


class InnerFunction(Layer):
    def forward(self, x):
        where = torch.where

        def loop(w, idx, y):
            for e in range(self.num_experts):
                t, s = where(idx == e)
                if not t.numel():
                    continue
                y.index_add_(0, t, self.experts[e](x[t]) * w[t, s, None])
            return y

        return loop(*self.route(x), torch.zeros_like(x))


class InMethodWithSuper(RangeWhere):
    """The loop stands in a method that a subclass calls by `super()`, with a private name beside it."""

    def __init__(self):
        super().__init__()
        self.__scale = 0.5

    def forward(self, x):
        y = super().forward(x) * self.__scale
        w, idx = self.route(x)
        for e, expert in enumerate(self.experts):
            t, s = torch.where(idx == e)
            y.index_add_(0, t, self.__scale * expert(x[t]) * w[t, s, None])
        return y


FORMS = (
    RangeWhere,
    HitRows,
    HitRowsNotUnwrapped,
    BooleanMask,
    Enumerate,
    UniqueTolist,
    TolistBefore,
    Dict,
    DictNames,
    NumbersAsNames,
    KeysOfADict,
    CountedByHand,
    NamedParameters,
    StackedColumns,
    ZipOfParts,
    ByAttributes,
    PlusEquals,
    Recast,
    ParameterLists,
    DictValues,
    InnerFunction,
    InMethodWithSuper,
)
