"""Any number of experts a token: gates by ReLU, by a threshold, by a mass of probability; and their near misses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import E, Spelling, batches, tokens
from spellings_strangers import Chosen


class ReluGates(Chosen):
    """ReLU routing: where the gate is positive."""

    def forward(self, x):
        gate = F.relu(self.router(x))
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            sel = gate[:, e] > 0
            y[sel] += gate[sel, e : e + 1] * expert(x[sel])
        return y


class AboveThreshold(Chosen):
    """Probabilities above a threshold, with a mask of its own."""

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        probs = self.router(x).softmax(-1)
        mask = probs > 0.2
        y = torch.zeros_like(x)
        for e in range(E):
            rows = torch.where(mask[:, e])[0]
            if rows.numel() == 0:
                continue
            y.index_add_(0, rows, self.experts[e](x[rows]) * probs[rows, e].unsqueeze(-1))
        return y.view(shape)


class TopMass(Chosen):
    """The fewest experts that hold a mass of probability; weights renormalised over them."""

    def forward(self, x):
        probs = self.router(x).softmax(-1)
        ordered, places = probs.sort(dim=-1, descending=True)
        keep = ordered.cumsum(-1) - ordered < 0.6
        mask = torch.zeros_like(keep).scatter(1, places, keep)
        gates = probs * mask
        gates = gates / gates.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            sel = mask[:, e]
            if sel.any():
                y[sel] = y[sel] + expert(x[sel]) * gates[sel, e, None]
        return y


class GatesOfChosen(Chosen):
    """Rows by a top-k, weights by the expert's column of all gates."""

    def forward(self, x):
        probs = self.router(x).softmax(-1)
        chosen = probs.topk(2, dim=-1).indices
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            sel = (chosen == e).any(-1)
            y[sel] += expert(x[sel]) * probs[sel, e].unsqueeze(-1)
        return y


class DenseRelu(Chosen):
    """Every expert on every token, times gates that ReLU made."""

    def forward(self, x):
        gate = F.relu(self.router(x))
        return sum(gate[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


class DenseAbove(Chosen):
    """Every expert on every token, times the probabilities above their mean, renormalised."""

    def forward(self, x):
        probs = self.router(x).softmax(-1)
        gates = probs * (probs > 1 / E)
        gates = gates / gates.sum(-1, keepdim=True)
        rows = torch.stack([expert(x) for expert in self.experts], dim=1)
        return torch.einsum("te,teh->th", gates, rows)


class DenseSoft(Chosen):
    """Every expert counts for every token: nothing is left out."""

    def forward(self, x):
        gate = self.router(x).softmax(-1)
        return sum(gate[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


class NextColumn(ReluGates):
    """Each expert is weighted by the next one's gate."""

    def forward(self, x):
        gate = F.relu(self.router(x))
        other = gate.roll(-1, dims=1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            sel = gate[:, e] > 0
            y[sel] += other[sel, e : e + 1] * expert(x[sel])
        return y


class GrowingThreshold(ReluGates):
    """A threshold that depends on the expert."""

    def forward(self, x):
        gate = F.relu(self.router(x))
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            sel = gate[:, e] > 0.1 * e
            y[sel] += gate[sel, e : e + 1] * expert(x[sel])
        return y


SPELLINGS = (
    Spelling("ReluGates", "P1", ReluGates, tokens),
    Spelling("AboveThreshold", "P1", AboveThreshold, batches),
    Spelling("TopMass", "P1", TopMass, tokens),
    Spelling("DenseRelu", "P6", DenseRelu, tokens),
    Spelling("DenseAbove", "P6", DenseAbove, tokens),
    Spelling("GatesOfChosen", "P1", GatesOfChosen, tokens),
)

NEAR = (DenseSoft, NextColumn, GrowingThreshold)
"""What must compute what it did, fused or not."""
