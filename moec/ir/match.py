"""A match either holds or says why not: `NoMatch` is a value with a reason, never an exception."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class NoMatch:
    """Why a candidate is not what was looked for.

    reason  the predicate that failed, with the value seen
    at      name of the value looked at
    depth   how far the match had come; the deepest miss is the nearest one
    hint    what the user could change, if anything
    held    the predicates that had held before, in order, each with the value seen
    """

    reason: str
    at: str = ""
    depth: int = 0
    hint: str = ""
    held: tuple[str, ...] = ()

    def deeper(self, by: int = 1) -> NoMatch:
        """This miss as seen from one step further out."""
        return replace(self, depth=self.depth + by)

    def after(self, *held: str) -> NoMatch:
        """This miss with what had held before it."""
        return replace(self, held=(*held, *self.held))


def nearest(misses: list[NoMatch]) -> NoMatch:
    """The miss that came furthest."""
    return max(misses, key=lambda m: m.depth, default=NoMatch("nothing here looks like an MoE layer"))
