"""One runnable file that reproduces a site: its spec, sizes and random inputs; kernel and twin are compared."""

from __future__ import annotations

from importlib.resources import files

import sympy

from moec.codegen.tuning import Sizes
from moec.errors import TargetError
from moec.ir.dtypes import DTYPES, STORED
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.report import Report, Site


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


def source(site: Site, sizes: Sizes, seed: int = 0) -> str:
    """The file's text."""
    from jinja2 import Environment, StrictUndefined

    spec = KernelSpec.parse(site.spec)
    text = files("moec.tools").joinpath("repro.py.j2").read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(text)
    return template.render(
        site=site,
        spec=spec,
        sizes=sizes,
        seed=seed,
        shapes=[(group, _shape(spec.experts, group)) for group in spec.experts.param_groups],
        dtype=f"{DTYPES[spec.experts.dtype]}",
        dtypes={group: str(STORED[spec.experts.stored(group)]) for group in spec.experts.param_groups},
        tolerance={"f32": 1e-4}.get(spec.experts.dtype, 4e-2),
    )


def _shape(spec: ExpertsSpec, group: str) -> str:
    """A parameter's shape in letters, as code: `E, 2 * F, H`."""
    shape = spec.stored_shape(group, *sympy.symbols("H F O"))
    sizes = [*(["E"] if spec.stacked else []), *(str(size).replace("*", " * ") for size in shape)]
    return f"{sizes[0]}," if len(sizes) == 1 else ", ".join(sizes)
