"""What `moec kernels` does: compiles a layer's GPU kernels without a GPU and prints what the compiler made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from moec.gpu.target import gpu_target
from moec.kernels.compiled import Layer, compile_layers, requests
from moec.kernels.jobs import Request, parse_config
from moec.kernels.view import NOTE, diff_view, layer_view, text_diff, text_of
from moec.options import Environment
from moec.tools.typed import seconds_given


@dataclass(frozen=True)
class KernelsCommand:
    """What was typed. `show`: the texts to print instead of the table: source, asm, ptx, ttgir."""

    what: str
    target: str
    sizes: str
    config: tuple[str, ...]
    kernel: str
    diff: tuple[str, str] | None
    show: tuple[str, ...]
    timeout: float

    def __post_init__(self) -> None:
        seconds_given("--timeout", self.timeout)


def run_kernels(command: KernelsCommand, console: Console) -> list[tuple[Layer, Layer | None]]:
    """(layer, the layer it is compared with) for every distinct layer asked for, compiled."""
    named = requests(command.what, gpu_target(command.target), command.sizes, parse_config(command.config))
    if command.diff is None:
        return [(layer, None) for layer in _compiled(command, named, console)]
    both = [[(name, request.varied(text)) for name, request in named] for text in command.diff]
    old, new = (_compiled(command, requested, console) for requested in both)
    return list(zip(old, new, strict=True))


def _compiled(command: KernelsCommand, named: Sequence[tuple[str, Request]], console: Console) -> list[Layer]:
    with console.status("compiling kernels") as status:

        def told(done: int, of: int) -> None:
            status.update(f"compiling kernels: {done} of {of}")

        cache = Environment.read().cache_dir
        return compile_layers(named, cache, command.timeout, (command.kernel,) if command.kernel else (), told)


def show_kernels(command: KernelsCommand, found: Sequence[tuple[Layer, Layer | None]], console: Console) -> None:
    """Print the tables, or the texts that were asked for."""
    for old, new in found:
        if command.show:
            _show_texts(command, old, new)
        elif new is None:
            console.print(layer_view(old))
        else:
            console.print(diff_view(old, new))
    if not command.show:
        console.print(Text(NOTE, "dim"))


def _show_texts(command: KernelsCommand, old: Layer, new: Layer | None) -> None:
    from moec.codegen.triton_emit import emit

    # Plain prints: what goes into a file or a pager must be what the compiler wrote.
    for kind in command.show:
        if kind == "source":
            print(emit(old.request.spec))
        elif new is None:
            for kernel in old.kernels:
                print(text_of(kernel, kind))
        else:
            for line in text_diff(old, new, kind):
                print(line)


def kernels_data(found: Sequence[tuple[Layer, Layer | None]]) -> list[dict[str, Any]]:
    """The same for --json."""
    return [old.to_dict() if new is None else {"old": old.to_dict(), "new": new.to_dict()} for old, new in found]
