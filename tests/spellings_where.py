"""Every expert on every token: chosen by `where`, added up within a longer sum, with straight-through gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spelling import E, K, Spelling, batches, tokens
from spellings_strangers import Chosen
from torch import nn


class Chain(Chosen):
    """Each token keeps what its one expert makes of it; the gate comes behind."""

    def forward(self, x):
        gate, chosen = F.softmax(self.router(x), -1).max(-1)
        y = torch.zeros_like(x)
        for e in range(E):
            y = torch.where((chosen == e).unsqueeze(-1), self.experts[e](x), y)
        return y * gate[:, None]


class GatedChain(Chosen):
    """The gate inside; what the chain begins with is nobody's, since the masks are of all experts."""

    def forward(self, x):
        gate, chosen = F.softmax(self.router(x), -1).topk(1, -1)
        y = x
        for e, expert in reversed(list(enumerate(self.experts))):
            y = torch.where(chosen == e, gate * expert(x), y)
        return x + y


class ChainPerSlot(Chosen):
    """A chain for each choice."""

    def forward(self, x):
        w, chosen = self.choose(x)
        out = 0
        for s in range(K):
            y = torch.zeros_like(x)
            for e in range(E):
                y = torch.where((chosen[:, s] == e)[:, None], self.experts[e](x), y)
            out = out + y * w[:, s, None]
        return out


class MaskedSum(Chosen):
    """Zeros where the expert is not chosen, added up over experts and slots."""

    def forward(self, x):
        w, chosen = self.choose(x)
        out = torch.zeros_like(x)
        for e in range(E):
            for s in range(K):
                rows = self.experts[e](x) * w[:, s : s + 1]
                out = out + torch.where((chosen[:, s] == e)[:, None], rows, torch.zeros_like(x))
        return out


class Sequences(Chosen):
    """Tokens on two axes."""

    def forward(self, x):
        gate, chosen = F.softmax(self.router(x), -1).max(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = torch.where(chosen == e, gate * expert(x), y)
        return y


class Residual(Chosen):
    """A dense sum of experts, then added to the tokens."""

    def gates(self, x):
        w, chosen = self.choose(x)
        return torch.zeros(x.shape[0], E).scatter(-1, chosen, w)

    def forward(self, x):
        gates, out = self.gates(x), 0
        for e in range(E):
            out = out + gates[:, e : e + 1] * self.experts[e](x)
        return x + out


class FromTokens(Residual):
    """The sum begins with the tokens, a shared expert in its middle."""

    def forward(self, x):
        gates, out = self.gates(x), x
        for e in range(E):
            out = out + gates[:, e : e + 1] * self.experts[e](x)
            if e == 1:
                out = out + F.silu(self.router(x)).sum(-1, keepdim=True) * x + x.tanh()
        return out


class TwoLayers(nn.Module):
    """A residual stream through two of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Residual(), Residual()

    def forward(self, x):
        return self.second(self.first(x))


class Soft(Residual):
    """Gates that no choice made."""

    def gates(self, x):
        return torch.where(self.router(x) > 0, self.router(x).softmax(-1), 0.1)


class NotAll(Chosen):
    """The tokens of one expert stay as they are."""

    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        y = x
        for e in range(E - 1):
            y = torch.where((chosen == e).unsqueeze(-1), self.experts[e](x), y)
        return y


class TwoChoices(Chosen):
    """Masks of two choices: the later one wins."""

    def forward(self, x):
        _, chosen = self.choose(x)
        y = torch.zeros_like(x)
        for e in range(E):
            y = torch.where((chosen[:, e % 2] == e).unsqueeze(-1), self.experts[e](x), y)
        return y


class Twice(Chosen):
    """One expert's mask twice: the later one wins."""

    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        y = torch.zeros_like(x)
        for e in (0, 1, 2, 3, 2):
            y = torch.where((chosen == e).unsqueeze(-1), self.experts[(e + len(y.shape)) % E](x), y)
        return y


class Hard(Chosen):
    """The chosen expert's gate is 1, its gradient the softmax's."""

    def gates(self, x):
        p = F.softmax(self.router(x), -1)
        return F.one_hot(p.argmax(-1), E).to(p.dtype) - p.detach() + p

    def forward(self, x):
        every = torch.stack([expert(x) for expert in self.experts], 1)
        return (every * self.gates(x)[..., None]).sum(1)


class HardDifference(Hard):
    """The difference as a whole."""

    def gates(self, x):
        p = F.softmax(self.router(x), -1)
        return (F.one_hot(p.argmax(-1), E).to(p.dtype) - p).detach() + p


class HardTopK(Hard):
    """The same for weights of several experts."""

    def gates(self, x):
        p = F.softmax(self.router(x), -1)
        w, chosen = p.topk(K, -1)
        hard = torch.zeros_like(p).scatter(-1, chosen, w / w.sum(-1, keepdim=True))
        return hard.detach() + p - p.detach()


class OtherNumbers(Hard):
    """What is added again is not what was taken away."""

    def gates(self, x):
        p = F.softmax(self.router(x), -1)
        return F.one_hot(p.argmax(-1), E).to(p.dtype) - p.detach() + F.softmax(2 * self.router(x), -1)


class AddedTwice(Hard):
    """Taken away once, added twice."""

    def gates(self, x):
        p = F.softmax(self.router(x), -1)
        return F.one_hot(p.argmax(-1), E).to(p.dtype) - p.detach() + p + p


SPELLINGS = (
    *(Spelling(kind.__name__, "P6", kind, tokens) for kind in (Chain, GatedChain, ChainPerSlot, MaskedSum, Residual)),
    Spelling("FromTokens", "P6", FromTokens, tokens),
    Spelling("TwoLayers", "P14", TwoLayers, tokens, sites=2),
    Spelling("Sequences", "P6", Sequences, batches),
)
"""Fused with gradients."""

NEAR = (Soft, NotAll, TwoChoices, Twice, OtherNumbers, AddedTwice)

STRAIGHT = (Hard, HardDifference, HardTopK)
"""Fused where nothing is trained: in training every expert's gate has a gradient."""
