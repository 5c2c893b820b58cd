"""Fields of the IR's dataclasses as `name=value` text and back, dropped where they have their default.

The values are told apart by the field's annotation, so a field that is added to
`moec.ir.site` prints and parses at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, Protocol

import sympy

from moec.ir.dims import dim_text, read_dim
from moec.ir.lex import Reader, word_text
from moec.ir.text import items

SHORT: Mapping[str, str] = {"num_experts": "E", "width": "F"}
"""Fields that are spelled by their letter."""


class Words(Protocol):
    """Any dataclass of moec.ir.site."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def dim_field(value: sympy.Expr) -> str:
    """A size; in brackets where it has spaces."""
    text = dim_text(value)
    return f"({text})" if " " in text else text


def _read_float(reader: Reader) -> float:
    return float(reader.number())


def _read_int(reader: Reader) -> int:
    token, number = reader.peek, reader.number()
    return number if isinstance(number, int) else reader.fail("a whole number", token)


def _read_bool(reader: Reader) -> bool:
    if reader.peek.text not in ("True", "False"):
        reader.fail("True or False")
    return reader.take().text == "True"


def _read_words(reader: Reader) -> tuple[str, ...]:
    reader.expect("[")
    return items(reader, Reader.word, "]")


@dataclass(frozen=True)
class Kind:
    """How fields of one annotation print and read back."""

    text: Callable[[Any], str]
    read: Callable[[Reader], Any]


KINDS: Mapping[str, Kind] = {
    "str": Kind(word_text, Reader.word),
    "int": Kind(repr, _read_int),
    "float": Kind(lambda v: repr(float(v)), _read_float),
    "bool": Kind(repr, _read_bool),
    "Dim": Kind(dim_field, read_dim),
    "tuple[str, ...]": Kind(lambda v: f"[{', '.join(map(word_text, v))}]", _read_words),
}


def tail_text(words: Words, spelled: str, always: str = "") -> str:
    """The fields that are not `spelled` elsewhere, where they differ from their defaults or are to show `always`."""
    parts: list[str] = []
    for f in fields(words):
        value = getattr(words, f.name)
        if f.name in spelled.split() or (f.name not in always.split() and _same(value, f.default)):
            continue
        name = SHORT.get(f.name, f.name)
        parts.append(name if value is True else f"{name}={KINDS[str(f.type)].text(value)}")
    return " ".join(parts)


def _same(value: Any, default: Any) -> bool:
    return default is not MISSING and type(value) is type(default) and repr(value) == repr(default)


def read_tail(reader: Reader, cls: type[Words], into: dict[str, Any]) -> None:
    """Read `name=value` and flags as long as names come, into a dictionary of constructor arguments."""
    known = {SHORT.get(f.name, f.name): f for f in fields(cls)}
    while reader.peek.kind == "name":
        token = reader.peek
        found = known.get(token.text)
        if found is None:
            reader.fail(f"a field of {cls.__name__} ({', '.join(known)})", token)
        if found.name in into:
            reader.fail(f"{token.text!r} once", token, "it twice")
        reader.take()
        flag = found.type == "bool" and not reader.sees("=")
        if not flag:
            reader.expect("=")
        into[found.name] = True if flag else KINDS[str(found.type)].read(reader)
