"""What a rewrite is tried on: random values, and the routings that break dispatches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.ir.dtypes import GRAPH_DTYPES
from moec.ir.graph import Type
from moec.proof.copying import Leaf, Unprovable
from moec.proof.region import Pair
from moec.proof.sizes import Sizes

WIDENED = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""What becomes fp64 where the rewrite's structure is compared."""


@dataclass(frozen=True)
class Trial:
    """One try.

    routing    random | one expert | ties | repeated | crowded: all choices fall on two experts, in both orders
               | dropped: some choices are no expert's
    exact      in fp64, where two spellings of one sum differ by 1e-15; else in the model's own dtypes
    tokens     which of the sizes that `shrunk` offers
    gradients  compared too, where they flow
    """

    routing: str
    exact: bool
    tokens: int = 0
    gradients: bool = True


SHORT: tuple[Trial, ...] = (
    Trial("random", True),  # idle experts too, where there are more of them than choices
    Trial("one expert", True),
    Trial("ties", False, 1, gradients=False),
    Trial("repeated", True),
    Trial("crowded", True),
    Trial("dropped", True),
)
"""What every distinct rewrite goes through when it is compiled."""


def applies(trial: Trial, pair: Pair) -> bool:
    """Whether a routing can be, and tells something.

    One token that chooses an expert twice: where nothing says that it cannot. Queues that overflow with first and
    second choices mixed: where experts have seats. Choices of no expert: where a loop asks who chose an expert, so
    that it passes them by.
    """
    needs: Mapping[str, bool] = {
        "repeated": not pair.distinct,
        "crowded": "seats" in dict(pair.site.attrs),
        "dropped": pair.site.word == "bodies" and not pair.distinct,
    }
    return needs.get(trial.routing, True)


def values(pair: Pair, trial: Trial, sizes: Sizes, seed: int = 0) -> dict[str, Tensor]:
    """A tensor for each leaf, on the CPU, the same for the same arguments. Raises Unprovable."""
    generator = torch.Generator("cpu").manual_seed(seed)
    experts = pair.site.attrs and dict(pair.site.attrs).get("experts")
    count = int(experts) if isinstance(experts, int) else 2
    make = Maker(generator, trial, count)
    found: dict[str, Tensor] = {}
    for leaf in pair.leaves:
        dtype = dtype_of(leaf.type, trial.exact)
        found[leaf.name] = make.leaf(leaf, sizes.shape(leaf.type.shape), dtype)
    return found


def dtype_of(kind: Type, exact: bool) -> torch.dtype:
    """The dtype of a leaf; raises Unprovable for one that torch cannot make here."""
    if kind.dtype not in GRAPH_DTYPES:
        raise Unprovable(f"a value of type {kind} cannot be made up")
    dtype = GRAPH_DTYPES[kind.dtype]
    return torch.float64 if exact and dtype in WIDENED else dtype


@dataclass(frozen=True)
class Maker:
    """Makes leaves of one trial; `experts` is E."""

    generator: torch.Generator
    trial: Trial
    experts: int

    def leaf(self, leaf: Leaf, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """One leaf's value."""
        if leaf.role == "choice":
            return self._choice(shape).to(dtype)
        if dtype == torch.bool:
            return self._integers(shape, 0, 2).bool()
        if not dtype.is_floating_point:
            return self._integers(shape, 0, self.experts).to(dtype)
        roles: Mapping[str, Callable[[tuple[int, ...]], Tensor]] = {
            "token": self._token,
            "weight": self._weight,
            "sparse": lambda size: self._sparse(self._given(size)),
            "sparse weight": lambda size: self._sparse(self._weight(size)),
            "router": self._router,
            "param": self._param,
        }
        return roles.get(leaf.role, self._given)(shape).to(dtype)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def _integers(self, shape: tuple[int, ...], low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device="cpu")

    def _token(self, shape: tuple[int, ...]) -> Tensor:
        """Whole numbers make logits exact whatever the order of summation, and many of them equal."""
        if self.trial.routing == "ties":
            return self._integers(shape, -1, 2)
        return self._normal(shape).abs() if self.trial.routing == "one expert" else self._normal(shape)

    def _router(self, shape: tuple[int, ...]) -> Tensor:
        if self.trial.routing == "ties":
            return self._integers(shape, -1, 2)
        if self.trial.routing == "one expert":  # one positive row: every token's best; the others tie
            rows = torch.zeros(shape, dtype=torch.float64, device="cpu")
            if len(shape) > 1:
                rows[shape[0] // 2] = 0.25
            return rows
        return self._normal(shape) * (0.3 if len(shape) > 1 else 0.1)

    def _param(self, shape: tuple[int, ...]) -> Tensor:
        fan = 1 if len(shape) < 2 else shape[-1] * shape[-2] / max(shape[-1], shape[-2])
        return self._normal(shape) / fan**0.5

    def _weight(self, shape: tuple[int, ...]) -> Tensor:
        return self._normal(shape).abs() + 0.1

    def _sparse(self, values: Tensor) -> Tensor:
        """Every third row's last number is 0, where it has others."""
        if values.dim() > 1 and values.shape[-1] > 1:
            values[::3, ..., -1] = 0
        return values

    def _given(self, shape: tuple[int, ...]) -> Tensor:
        return self._normal(shape)

    def _choice(self, shape: tuple[int, ...]) -> Tensor:
        """Different experts for each token; the same for all; or the same one twice."""
        k = shape[-1] if len(shape) > 1 else 1
        k = k if k <= self.experts else 1  # more than there are experts: the last axis is one of tokens
        rows = math.prod(shape) // k if k else 0
        if self.trial.routing == "crowded":
            side = self._integers((rows, 1), 0, 2) + torch.arange(k, device="cpu")
            return ((self.experts // 2 + side % max(2, k)) % self.experts).reshape(shape)
        if self.trial.routing == "dropped":
            return self._integers((rows, k), -1, self.experts + 1).reshape(shape)
        if self.trial.routing == "random":
            order: Any = torch.rand((rows, max(self.experts, k)), generator=self.generator, device="cpu").argsort(-1)
            return order[:, :k].reshape(shape)
        first = self._integers((rows, 1), 0, self.experts) if self.trial.routing == "repeated" else self.experts // 2
        step = 0 if self.trial.routing == "repeated" else 1
        return ((first + step * torch.arange(k, device="cpu")) % self.experts).expand(rows, k).reshape(shape)
