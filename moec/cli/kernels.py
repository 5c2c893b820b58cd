"""`moec kernels SPEC|TARGET`: a layer's GPU kernels compiled without a GPU."""

from __future__ import annotations

from typing import Annotated

import typer

from moec.cli.io import console, print_json
from moec.cli.types import BROKEN_PROMISE, OK, Debug, Json


def kernels_command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="SPEC|TARGET",
            help="A model (file.py:callable), or a kernel spec's text with --sizes.",
            show_default=False,
        ),
    ],
    target: Annotated[str, typer.Option("--target", help="The GPU: sm_90, gfx942, h200, …")] = "sm_90",
    sizes: Annotated[
        str,
        typer.Option(help="Sizes: T=64,H=4096,F=14336,E=8,k=2 for a spec; for a model those that differ (T is 64)."),
    ] = "",
    config: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Tiles other than the default: block_m=64,num_stages=4."),
    ] = None,
    kernel: Annotated[str, typer.Option(help="Only the kernel of this name: dispatch, gate_up, down, …")] = "",
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="OLD NEW", help="Compare two targets, configurations or specs: sm_80 sm_90,num_stages=4."),
    ] = None,
    source: Annotated[bool, typer.Option("--source", help="Print the Triton source.")] = False,
    asm: Annotated[bool, typer.Option("--asm", help="Print the machine code.")] = False,
    ptx: Annotated[bool, typer.Option("--ptx", help="Print the PTX.")] = False,
    ttgir: Annotated[bool, typer.Option("--ttgir", help="Print Triton's GPU IR.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that one kernel may compile.")] = 120.0,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Compile a layer's GPU kernels without a GPU and show registers, memory, occupancy and the hot loop of each.

    Exit code 1: a kernel was refused by the compiler, or something is wrong with it on this target.
    """
    from moec.kernels.show import KernelsCommand, kernels_data, run_kernels, show_kernels

    show = tuple(n for n, on in (("source", source), ("asm", asm), ("ptx", ptx), ("ttgir", ttgir)) if on)
    command = KernelsCommand(what, target, sizes, tuple(config or ()), kernel, diff, show, timeout)
    found = run_kernels(command, console(stderr=True))
    if json:
        print_json(kernels_data(found))
    else:
        show_kernels(command, found, console())
    clean = all(layer.clean for pair in found for layer in pair if layer is not None)
    return OK if clean else BROKEN_PROMISE
