"""Values picked by a mask of their own shape, as an index at the places where it is true."""

from __future__ import annotations

from torch import fx

from moec.ir.graph import Arg, Ref
from moec.passes.raising.raise_graph import Builder, fake, type_of_fake
from moec.passes.raising.word_views import mask_rows
from moec.passes.raising.words import named


def raise_masked_select(build: Builder, node: fx.Node) -> Arg | None:
    """masked_select(x, m) of one shape is x[where(m)]."""
    args = named(node, "input mask")
    value, mask = build.value(args["input"]), build.value(args["mask"])
    if not isinstance(mask, Ref) or build.type_of(value).shape != build.type_of(mask).shape:
        return None
    kind = type_of_fake(fake(node))
    return build.emit("index", (value, *mask_rows(build, mask, kind.shape[0])), kind, dim=0)
