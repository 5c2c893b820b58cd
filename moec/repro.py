"""One runnable file that reproduces a site: its spec, sizes and random inputs; kernel and twin are compared."""

from __future__ import annotations

from importlib.resources import files

import sympy

from moec import ir
from moec.codegen.tuning import Sizes
from moec.errors import TargetError
from moec.graph import Type
from moec.report import Report, Site
from moec.site_parse import parse_site
from moec.spec import DTYPES, ExpertsSpec, KernelSpec


def find_site(report: Report, wanted: str | None) -> Site:
    """The fused site of that name, or number from 0, or the first; raises TargetError with what there is."""
    fused = [site for site in report.sites if site.status == "fused"]
    names = [site.name for site in fused]
    if not fused:
        raise TargetError("no layer is fused, so there is no kernel to reproduce; `moec explain` says why")
    if wanted is None:
        return fused[0]
    if wanted in names:
        return fused[names.index(wanted)]
    if wanted.isdigit() and int(wanted) < len(fused):
        return fused[int(wanted)]
    raise TargetError(f"no fused layer {wanted!r}; there are: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}")


def sizes_of(site: Site, tokens: int | None) -> Sizes:
    """The sizes in the site's IR; T is `tokens`, where given, and 16 where the model leaves it open."""
    parsed = parse_site(site.ir)
    numbers = {
        "H": parsed.x_type.shape[-1],
        "F": parsed.body.width,
        "E": parsed.num_experts,
        "k": parsed.select.k,
    }
    for letter, size in numbers.items():
        if not size.is_Integer:
            raise TargetError(f"layer {site.name}: {letter} is {size}, expected a number")
    return Sizes(tokens or _tokens(parsed, parsed.x_type), **{name: int(size) for name, size in numbers.items()})


def _tokens(site: ir.Site, kind: Type) -> int:
    count = sympy.Mul(*kind.shape[:-1])
    return int(count) if count.is_Integer else 16


def source(site: Site, sizes: Sizes, seed: int = 0) -> str:
    """The file's text."""
    from jinja2 import Environment, StrictUndefined

    spec = KernelSpec.parse(site.spec)
    text = files("moec").joinpath("repro.py.j2").read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(text)
    return template.render(
        site=site,
        spec=spec,
        sizes=sizes,
        seed=seed,
        shapes=[(group, _shape(spec.experts, group)) for group in spec.experts.param_groups],
        dtype=f"torch.{str(DTYPES[spec.experts.dtype]).removeprefix('torch.')}",
        tolerance={"f32": 1e-4}.get(spec.experts.dtype, 4e-2),
    )


def _shape(spec: ExpertsSpec, group: str) -> str:
    """A parameter's shape in letters, as code: `E, 2 * F, H`."""
    shape = spec.stored_shape(group, *sympy.symbols("H F"))
    sizes = [*(["E"] if spec.stacked else []), *(str(size).replace("*", " * ") for size in shape)]
    return f"{sizes[0]}," if len(sizes) == 1 else ", ".join(sizes)
