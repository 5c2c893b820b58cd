"""What `moec kernels` shows: a table a layer, a table of what changed between two, and the compiler's texts."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.text import Text

from moec.gpu.figures import Figures
from moec.gpu.offline import Compiled, Refused
from moec.kernels.compiled import Kernel, Layer
from moec.view.fitting import FittingTable

NOTE = "Read off compiled code: not run times. Nothing here ran on a GPU."


def layer_view(layer: Layer) -> RenderableType:
    """One layer's kernels as a table."""
    r = layer.request
    sizes = " ".join(f"{name}={value}" for name, value in r.sizes.__dict__.items())
    config = " ".join(f"{name}={value}" for name, value in r.full_config.__dict__.items())
    head = Text.assemble(
        (f"{layer.name} on {r.target.name}", "bold"), f" ({r.target.chip}) · {sizes}\n", (config, "dim")
    )
    table = FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("kernel", "registers", "spills", "shared KB", "occupancy", "matrix unit", "instr/step", "loads", ""):
        table.add_column(
            name, overflow="fold", justify="right" if name in ("registers", "spills", "instr/step") else "left"
        )
    for kernel in layer.kernels:
        table.add_row(*_row(kernel))
    return Group(head, table)


def _row(kernel: Kernel) -> tuple[str | Text, ...]:
    made = kernel.result
    if isinstance(made, Refused):
        return (kernel.name, "", "", "", "", "", "", "", Text(f"refused: {made.reason}", "red"))
    cells = cells_of(made.figures)
    notes = Text("; ".join(made.figures.problems), "red") if made.figures.problems else Text("ok", "green")
    return (kernel.name, *(cells[name] for name in _COLUMNS), notes)


_COLUMNS = ("registers", "spills", "shared KB", "occupancy", "matrix unit", "instr/step", "loads")


def cells_of(f: Figures) -> dict[str, str]:
    """A kernel's figures as short texts."""
    loop = f.loop
    mma = loop.mma if loop else f.mma
    loads = loop.loads if loop else f.loads
    return {
        "registers": str(f.registers),
        "spills": str(f.spill_stores + f.spill_loads),
        "shared KB": f"{f.shared / 1024:.4g} of {f.shared_limit >> 10}",
        "occupancy": f"{f.occupancy.share:.0%}: {f.occupancy.blocks}×{f.warps} warps ({f.occupancy.limit})",
        "matrix unit": _counts(mma) + (" · specialised" if f.specialized else ""),
        "instr/step": f"{loop.per_step:g}" if loop else "",
        "loads": _counts(loads),
    }


def _counts(found: Mapping[str, int]) -> str:
    return " ".join(f"{name}×{count}" for name, count in sorted(found.items()))


def diff_view(old: Layer, new: Layer) -> RenderableType:
    """What differs between two layers' figures, kernel by kernel; figures that are equal are left out."""
    left, right = ({kernel.name: kernel.result for kernel in layer.kernels} for layer in (old, new))
    table = FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("kernel", "figure", "old", "new"):
        table.add_column(name, overflow="fold")
    rows = 0
    for name in dict.fromkeys((*left, *right)):
        for figure, before, after in _changes(left.get(name), right.get(name)):
            table.add_row(name, figure, before, Text(after, "yellow"))
            rows += 1
    head = Text.assemble(("old ", "bold"), _described(old), "\n", ("new ", "bold"), _described(new))
    return Group(head, table if rows else Text("no figure differs", "green"))


def _described(layer: Layer) -> str:
    r = layer.request
    changed = ",".join(f"{name}={value}" for name, value in r.config) or "default configuration"
    return f"{r.target.name} · {changed} · {r.spec}"


def _changes(old: Compiled | Refused | None, new: Compiled | Refused | None) -> Iterator[tuple[str, str, str]]:
    if isinstance(old, Compiled) and isinstance(new, Compiled):
        left, right = (
            {**cells_of(made.figures), "instructions": str(made.figures.instructions)} for made in (old, new)
        )
        yield from ((name, left[name], right[name]) for name in left if left[name] != right[name])
        problems = ("; ".join(made.figures.problems) for made in (old, new))
        before, after = problems
        if before != after:
            yield "problems", before or "none", after or "none"
    elif _state(old) != _state(new):
        yield "", _state(old), _state(new)


def _state(made: Compiled | Refused | None) -> str:
    if made is None:
        return "not launched"
    return "compiles" if isinstance(made, Compiled) else f"refused: {made.reason}"


def text_of(kernel: Kernel, kind: str) -> str:
    """One of the compiler's texts (asm, ptx, ttgir); a line that says why where there is none."""
    made = kernel.result
    if isinstance(made, Refused):
        return f"# {kernel.name}: refused: {made.reason}\n"
    if kind == "asm":
        return made.assembly
    return made.texts.get(kind) or f"# {kernel.name}: this target has no {kind}; it has {', '.join(made.texts)}\n"


def text_diff(old: Layer, new: Layer, kind: str) -> Iterator[str]:
    """Unified diffs of one of the compiler's texts, kernel by kernel. Addresses and encodings are left out."""
    left, right = ({kernel.name: kernel for kernel in layer.kernels} for layer in (old, new))
    for name in left:
        if name in right:
            before, after = (_comparable(text_of(layer[name], kind)) for layer in (left, right))
            yield from difflib.unified_diff(before, after, f"old/{name}.{kind}", f"new/{name}.{kind}", lineterm="")


def _comparable(text: str) -> list[str]:
    """Lines; those of SASS without address and bits, which differ everywhere once one instruction differs."""
    lines: list[str] = []
    for line in text.splitlines():
        code = line.split("*/", 1)[1] if line.lstrip().startswith("/*") and "*/" in line else line
        lines.append(code.partition("/* 0x")[0].strip())
    return [line for line in lines if line]
