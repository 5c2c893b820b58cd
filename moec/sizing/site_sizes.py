"""The sizes of a layer that was found, as numbers: what its IR says, for those who build the layer anew."""

from __future__ import annotations

import sympy

from moec.codegen.tuning import Sizes
from moec.errors import TargetError
from moec.ir.site_parse import parse_site
from moec.report import Site


def sizes_of(site: Site, tokens: int | None = None, unknown: int = 16) -> Sizes:
    """T is `tokens`, else the model's own, else `unknown`. Raises TargetError where another size is not a number."""
    parsed = parse_site(site.ir)
    *rows, hidden = parsed.x_type.shape
    own = sympy.Mul(*rows)
    numbers = {"H": hidden, "F": parsed.body.width, "E": parsed.num_experts, "k": parsed.select.k}
    numbers["O"] = parsed.y_type.shape[-1]
    for letter, size in numbers.items():
        if not size.is_Integer:
            raise TargetError(f"layer {site.name}: {letter} is {size}, expected a number")
    count = tokens or (int(own) if own.is_Integer else unknown)
    return Sizes(count, **{letter: int(size) for letter, size in numbers.items()})
