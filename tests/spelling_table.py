"""Measures every spelling, as the tests do, and writes the README's table: `python tests/spelling_table.py --write`."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from compiling import compiled
from spelling import Spelling
from spellings import SPELLINGS

from moec.capture.breaks import Mark

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- spellings -->", "<!-- /spellings -->"
WHAT = {
    "P1": "static loop over experts",
    "P2": "loop over the experts that are hit",
    "P3": "stacked weights and a loop",
    "P4": "sort, offsets, grouped products",
    "P5": "gathered weights, `bmm` or `einsum`",
    "P6": "all experts dense, gates",
    "P7": "counts moved to the host, split, scattered back",
    "P8": "one-hot capacity `einsum` `[T, E, C]`, with drops",
    "P9": "masked multiply of every expert on every token",
    "P10": "expert choice",
    "P11": "shared expert",
    "P12": "router variants, logits returned, auxiliary losses",
    "P13": "experts that are not MLPs",
    "P14": "nested and repeated uses",
    "P15": "buffers updated in forward",
}


@dataclass(frozen=True)
class Measured:
    """What came of one example. forward and gradients: the largest relative error over T; −1 where not measured."""

    one_graph: bool
    fused: bool
    forward: float
    gradients: float
    why: str = ""


def all_spellings() -> tuple[Any, ...]:
    """The examples of this table's own files, and of the file of further spellings where there is one."""
    if importlib.util.find_spec("spellings_more") is None:
        return SPELLINGS
    return (*SPELLINGS, *importlib.import_module("spellings_more").SPELLINGS)


def tensors(result: Any) -> list[torch.Tensor]:
    """A module's outputs."""
    return list(result) if isinstance(result, tuple) else [result]


def error(got: Iterable[Any], want: Iterable[Any]) -> float:
    """The largest relative error; a missing gradient is one of zeros."""
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        if g is None and w is None:
            continue
        g, w = (torch.zeros_like(b if a is None else a) if a is None else a for a, b in ((g, w), (w, g)))
        worst = max(worst, float((g - w).detach().norm()) / max(float(w.detach().norm()), 1e-3))
    return worst


def gradients(run: Any, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor | None]:
    """Gradients of the inputs and of every parameter."""
    inputs = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in inputs)
    module.zero_grad()
    torch.manual_seed(7)
    sum(t.square().sum() for t in tensors(run(*inputs))).backward()
    return [*(x.grad for x in inputs if x.requires_grad), *(p.grad for p in module.parameters())]


def with_free_sizes(spelling: Spelling, counts: tuple[int, ...], count: int) -> tuple[torch.Tensor, ...]:
    """The inputs for T = count; sizes that depend on T are free, so that one compile is for all."""
    inputs = spelling.inputs(count)
    for x, *others in zip(inputs, *(spelling.inputs(other) for other in counts), strict=True):
        for dim, size in enumerate(x.shape):
            if any(other.shape[dim] != size for other in others):
                torch._dynamo.maybe_mark_dynamic(x, dim)
    return inputs


@lru_cache(maxsize=256)
def measured(
    spelling: Spelling, counts: tuple[int, ...] = (12, 40), kernels: str = "eager", trained: bool = True
) -> Measured:
    """Compile the example once for every T, and for gradients for T = counts[-1]; compare both with eager."""
    torch.manual_seed(0)
    module = spelling.make()
    run, report = compiled(module, kernels=kernels)
    reports, forward, mark = [report], 0.0, Mark.now()
    with torch.no_grad():
        for count in counts:
            inputs = with_free_sizes(spelling, counts, count)
            torch.manual_seed(7)
            want = tensors(module(*inputs))
            torch.manual_seed(7)
            forward = max(forward, error(tensors(run(*inputs)), want))
    broken = mark.breaks_since()  # before the next compile: Dynamo forgets them
    inputs = spelling.inputs(counts[-1])
    backward = -1.0
    if spelling.trains and trained:
        run, report = compiled(module, kernels=kernels)
        reports.append(report)
        backward = error(gradients(run, module, inputs), gradients(module, module, inputs))
    graphs = [g for report in reports for g in report.graph_reports]
    statuses = [[s.status for s in g.sites] for g in graphs]
    why = "; ".join(str(r) for g in graphs for s in g.sites if s.status != "fused" for r in s.reasons)
    fused = all(status == ["fused"] * spelling.sites for status in statuses)
    one_graph = len(graphs) <= len(counts) + 1 and not broken and not mark.breaks_since()
    return Measured(one_graph, fused, forward, backward, why or str(statuses))


def rows() -> list[str]:
    """The table: a row a spelling, with how many of its examples are so."""
    lines = [
        "| | spelling | examples | captured | fused | forward equal | gradients equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, what in WHAT.items():
        found = [measured(s) for s in all_spellings() if s.spelling == number]
        if not found:
            continue
        total, trained = len(found), [m for m in found if m.gradients >= 0]
        lines.append(
            f"| {number} | {what} | {total} | {_share(sum(m.one_graph for m in found), total)} "
            f"| {_share(sum(m.fused for m in found), total)} | {_share(sum(m.forward < 1e-5 for m in found), total)} "
            f"| {_share(sum(m.gradients < 1e-4 for m in trained), len(trained))} |"
        )
    return lines


def _share(part: int, whole: int) -> str:
    return "all" if part == whole else f"{part} of {whole}"


def shown(text: str) -> list[str]:
    """The table's lines in the README."""
    return text.split(BEGIN)[1].split(END)[0].strip().splitlines()


def written(text: str) -> str:
    """The README with the table between its markers."""
    if BEGIN not in text or END not in text:
        raise SystemExit(f"README.md has no lines {BEGIN} and {END}; put them where the table belongs")
    head, rest = text.split(BEGIN)
    return "\n".join([head + BEGIN, *rows(), END + rest.split(END)[1]])


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    if parser.parse_args().write:
        README.write_text(written(README.read_text()))
    else:
        print("\n".join(rows()))


if __name__ == "__main__":
    main()
