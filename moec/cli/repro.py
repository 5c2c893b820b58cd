"""`moec repro TARGET [SITE]`: one runnable file that reproduces a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moec.cli.io import print_json, say
from moec.cli.types import OK, Debug, Json, NoGrad, OptionPairs, TargetArgument, report_of
from moec.errors import OptionError
from moec.tools.typed import check_writable


def repro_command(
    target: TargetArgument,
    site: Annotated[
        str | None,
        typer.Argument(metavar="SITE", help="A fused layer's name, or its number from 0.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="The file to write.")] = Path("repro.py"),
    tokens: Annotated[
        int | None, typer.Option(help="T, the number of tokens; else the model's own.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
    options: OptionPairs = None,
    no_grad: NoGrad = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Write one runnable file that reproduces a layer: spec, sizes, random inputs; it compares kernel and twin."""
    from moec.sizing.site_sizes import sizes_of
    from moec.tools.repro import find_site, source

    if tokens is not None and tokens < 1:
        raise OptionError(f"--tokens {tokens} is too small; expected 1 or more")
    check_writable("--out", out)
    found = find_site(report_of(target, options, no_grad), site)
    sizes = sizes_of(found, tokens)
    out.write_text(source(found, sizes, seed), encoding="utf-8")
    if json:
        print_json({"site": found.name, "path": str(out), "spec": found.spec, "sizes": vars(sizes)})
    else:
        say(f"wrote {out}: {found.name}; run it with `python {out}`", stderr=False)
    return OK
