"""Ways in which a file of JSON lines can be broken: by chance, and a value of another kind at every place."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

FOREIGN: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 1e300, float("inf"), float("nan"),
    "", "\ud800", "[/x] $\\foo$", "9" * 5000, [], {}, [[]], {"a": None},
)  # fmt: skip
"""Values that may stand where another was: of other kinds, without end, no number, no character."""


def damaged(rng: random.Random, content: bytes) -> bytes:
    """`content` broken in one of many ways."""
    data = bytearray(content)
    kind = rng.randrange(10)
    if kind == 0:  # cut
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:  # bits turned over
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if kind == 2:  # a part lost
        a, b = sorted(rng.randrange(len(data)) for _ in range(2))
        del data[a : b + 1]
    if kind == 3:  # a part put in
        at = rng.randrange(len(data))
        data[at:at] = rng.randbytes(rng.randint(1, 50))
    if kind == 4:  # a part twice
        a, b = sorted(rng.randrange(len(data)) for _ in range(2))
        data[b:b] = data[a:b]
    if kind == 5:  # another encoding
        text = content.decode(errors="replace") + "é"
        return text.encode(rng.choice(("utf-16", "utf-32", "latin-1", "utf-7", "utf-8-sig")), errors="replace")
    if kind == 6:  # somebody else's JSON
        return rng.choice((b"{}", b"[]", b"7", b"null", b'"text"', b'{"a": [1]}', b"[" * 100_000, b'[{"a":' * 50_000))
    if kind == 7:
        return rng.randbytes(rng.randrange(4000))
    if kind == 8:
        return bytes(len(data))
    if kind == 9:
        return b"\n" * rng.randrange(3)
    return bytes(data)


def retyped(value: Any) -> Iterator[Any]:
    """A parsed value with each of `FOREIGN` at each place in turn, and with each place left out."""
    yield from FOREIGN
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from ({**value, name: changed} for changed in retyped(inner))
            yield {n: v for n, v in value.items() if n != name}
            yield {**value, f"{name}s": inner}
    if isinstance(value, list):
        for i, inner in list(enumerate(value))[:2]:
            yield from ([*value[:i], changed, *value[i + 1 :]] for changed in retyped(inner))


def as_line(value: Any) -> bytes:
    """One line of JSON, with what JSON has no words for as Python writes it."""
    return (json.dumps(value) + "\n").encode()
