"""The process of one way in a comparison: builds it, calls it once, then times single calls on request."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

LONG = 0.25  # seconds; a call this long does not notice what the process before it left in caches and on cores
SETTLED = 0.1  # seconds of calls before one that counts


@dataclass(frozen=True)
class Built:
    """A way, built: what to call with which inputs, and what is wrong with a result (empty: nothing)."""

    call: Callable[[Tensor], Any]
    inputs: Mapping[int, Tensor]
    wrong: Callable[[int, Any], str]


def serve(pipe: Connection, build: Callable[..., Built], args: tuple[Any, ...]) -> None:
    """Answer until the pipe closes. Questions (word, tokens): start, first, time; answers ("ok" | "failed", value)."""
    warnings.simplefilter("ignore")  # a way's own warnings would tear the progress display of the parent
    built: Built | None = None
    with torch.no_grad():
        while True:
            try:
                word, tokens = pipe.recv()
            except (EOFError, KeyboardInterrupt):
                return
            try:
                built = built or build(*args)
                answer: tuple[str, Any] = ("ok", _answer(built, word, tokens))
            except Exception as error:
                answer = ("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
            try:
                pipe.send(answer)
            except OSError:  # whoever asked did not wait: the comparison went on without this way
                return


def _answer(built: Built, word: str, tokens: int) -> float:
    if word == "start":
        return 0.0
    if word == "first":
        wrong = built.wrong(tokens, built.call(built.inputs[tokens]))
        if wrong:
            raise ValueError(wrong)
    return _settled(built, tokens)


def _settled(built: Built, tokens: int) -> float:
    """Seconds of one call of many in a row, as in decoding.

    The way timed before this one leaves threads that spin for a while and its own data in the caches; short calls are
    made until that is over, and the last one counts.
    """
    end = time.perf_counter() + SETTLED
    seconds = _seconds(built, tokens)
    while seconds < LONG and time.perf_counter() < end:
        seconds = _seconds(built, tokens)
    return seconds


def _seconds(built: Built, tokens: int) -> float:
    x = built.inputs[tokens]
    start = time.perf_counter()
    built.call(x)
    return time.perf_counter() - start
