"""How an op of a compiled graph runs, as the text in the graph: `auto`, `auto fresh`, `cpp race weights=int8:128`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from moec.errors import OptionError

Schedule = Literal["pointers", "descriptors", "persistent", "specialized"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)

_WEIGHTS = re.compile(r"stored|packed|bf16|(int8|fp8)(:[1-9]\d{0,5})?")
# What is asked for by a word of its own, where it differs from this.
_PLAIN = (("weights", "stored"), ("combine", "ordered"), ("schedule", "pointers"), ("tokens", ""), ("capacity", ""))
_VALUES = {
    "weights": _WEIGHTS,
    "combine": re.compile("ordered|atomic"),
    "schedule": re.compile("|".join(SCHEDULES)),
    "tokens": re.compile(r"\d+(\.\.\d+)?"),
    "capacity": re.compile(r"[\w.+*/(),-]+"),
}
_FLAGS = ([], ["race"], ["fresh"], ["race", "fresh"])


@dataclass(frozen=True)
class Engine:
    """kind: auto, cpp, triton or eager; race: candidates and eager's form race at first use of a size.

    weights: stored, the user's own tensors are read; packed: a copy in the order in which kernels read; bf16, int8 (a
    scale a channel), int8:N (a scale for N numbers of it), fp8 (a scale a matrix) or fp8:N (a scale for N×N numbers of
    it): a copy in fewer bytes.
    combine: ordered, a token's slots are added in their order; atomic, in any (Triton kernels).
    schedule: how Triton's grouped products run: by pointers, by tensor descriptors, persistent, with specialized warps.
    fresh: gradients of parameters are new memory in every step.
    tokens: the range of T, as in TokenRange, for whose most tokens buffers are taken; empty: for those of each call.
    capacity: what the graph says of the rows that one expert can get, as a formula of T; empty: nothing but T.
    """

    kind: str = "auto"
    race: bool = False
    weights: str = "stored"
    combine: str = "ordered"
    schedule: str = "pointers"
    fresh: bool = False
    tokens: str = ""
    capacity: str = ""

    def __str__(self) -> str:
        words = [self.kind, *(["race"] if self.race else []), *(["fresh"] if self.fresh else [])]
        words += [f"{name}={getattr(self, name)}" for name, plain in _PLAIN if getattr(self, name) != plain]
        return " ".join(words)

    @staticmethod
    def parse(text: str) -> Engine:
        """The engine that prints as `text`; raises OptionError."""
        return _parse(text)

    @property
    def plain(self) -> bool:
        """Whether weights are read as they are stored and nothing races."""
        return not self.race and self.weights == "stored"


def check_weights(text: str) -> None:
    """Raises OptionError for what names no way to store weights."""
    if not _WEIGHTS.fullmatch(text):
        raise OptionError(
            f"option weights={text!r}; expected stored, packed, bf16, int8, int8:N such as int8:128, fp8 or fp8:N"
        )


def only_for_triton(weights: str) -> bool:
    """Whether C++ kernels make no such copy of the weights, and read them as they are stored."""
    return weights.startswith("fp8")


@lru_cache(maxsize=256)
def _parse(text: str) -> Engine:
    kind, *words = text.split(" ")
    named = {name: value for name, equals, value in (word.partition("=") for word in words) if equals}
    rest = [word for word in words if "=" not in word]
    right = all(name in _VALUES and _VALUES[name].fullmatch(value) for name, value in named.items())
    if len(named) + len(rest) != len(words) or rest not in _FLAGS or not right:
        raise OptionError(
            f"engine {text!r}: expected a kind such as auto, then `race`, `fresh`, `weights=…`, `combine=…`,"
            " `schedule=…`, `tokens=…` or `capacity=…`"
        )
    return Engine(kind, "race" in rest, **named, fresh="fresh" in rest)
