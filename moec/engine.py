"""How an op of a compiled graph runs, as the text in the graph: `auto`, `cpp race`, `auto weights=int8:128`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from moec.errors import OptionError

_WEIGHTS = re.compile(r"stored|packed|bf16|(int8|fp8)(:[1-9]\d{0,5})?")


@dataclass(frozen=True)
class Engine:
    """kind: auto, cpp, triton or eager; race: candidates and eager's form race at first use of a size.

    weights: stored, the user's own tensors are read; packed: a copy in the order in which kernels read; bf16, int8 (a
    scale a channel), int8:N (a scale for N numbers of it), fp8 (a scale a matrix) or fp8:N (a scale for N×N numbers of
    it): a copy in fewer bytes.
    """

    kind: str = "auto"
    race: bool = False
    weights: str = "stored"

    def __str__(self) -> str:
        race = " race" if self.race else ""
        return f"{self.kind}{race}{'' if self.weights == 'stored' else f' weights={self.weights}'}"

    @staticmethod
    def parse(text: str) -> Engine:
        """The engine that prints as `text`; raises OptionError."""
        return _parse(text)

    @property
    def plain(self) -> bool:
        """Whether nothing but the kind is asked for."""
        return not self.race and self.weights == "stored"


def check_weights(text: str) -> None:
    """Raises OptionError for what names no way to store weights."""
    if not _WEIGHTS.fullmatch(text):
        raise OptionError(
            f"option weights={text!r}; expected stored, packed, bf16, int8, int8:N such as int8:128, fp8 or fp8:N"
        )


@lru_cache(maxsize=256)
def _parse(text: str) -> Engine:
    kind, *words = text.split(" ")
    weights = [w.removeprefix("weights=") for w in words if w.startswith("weights=")]
    rest = [w for w in words if not w.startswith("weights=")]
    if len(weights) > 1 or rest not in ([], ["race"]) or not all(map(_WEIGHTS.fullmatch, weights)):
        raise OptionError(f"engine {text!r}: expected a kind such as auto, then `race` and `weights=…` where wanted")
    return Engine(kind, bool(rest), *weights)
