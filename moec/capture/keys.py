"""A dictionary's key that depends on a rolled loop's item: a text with its number, or the name at its place."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor


class Key:
    """A key with a symbolic item. All that can be done with it is to look something up."""

    item: Tensor

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError("the body compares a name that depends on the loop's item")

    __hash__ = None  # type: ignore[assignment]


class TextKey(Key):
    """The key `f"{prefix}{item}{suffix}"` of a ModuleDict."""

    def __init__(self, prefix: str, item: Tensor, suffix: str) -> None:
        self.prefix = prefix
        self.item = item
        self.suffix = suffix

    def wanted(self, count: int) -> list[str]:
        """The keys of the first items."""
        return [f"{self.prefix}{i}{self.suffix}" for i in range(count)]


class NameKey(Key):
    """The key `names[item]`."""

    def __init__(self, names: list[str], item: Tensor) -> None:
        self.names = names
        self.item = item

    def wanted(self, count: int) -> list[str]:
        """The keys of all items."""
        return self.names


def are_names(items: Any) -> bool:
    """Whether something is a list of texts."""
    return isinstance(items, (list, tuple)) and len(items) > 0 and all(isinstance(each, str) for each in items)


def key_at(item: Tensor, names: list[str]) -> Key:
    """The name at the item's place; a text with its number, where names are `expert_0`, `expert_1`, … in order."""
    first = names[0] if names else ""
    for at in [at for at, letter in enumerate(first) if letter == "0"]:
        prefix, suffix = first[:at], first[at + 1 :]
        if names == [f"{prefix}{i}{suffix}" for i in range(len(names))]:
            return TextKey(prefix, item.reshape(()), suffix)
    return NameKey(names, item.reshape(()))


def text_key(prefix: str, item: Any, suffix: str) -> Any:
    """`f"{prefix}{item}{suffix}"` of the loop's item, for a ModuleDict."""
    if isinstance(item, TextKey):
        return TextKey(prefix + item.prefix, item.item, item.suffix + suffix)
    if isinstance(item, NameKey):
        return NameKey([f"{prefix}{each}{suffix}" for each in item.names], item.item)
    return TextKey(prefix, item.reshape(()), suffix) if isinstance(item, Tensor) else f"{prefix}{item}{suffix}"
