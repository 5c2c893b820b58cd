"""What `moec inspect` shows: table, IR, pass diffs, kernel source; and the same as data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.rule import Rule
from rich.syntax import Syntax
from rich.text import Text

from moec.errors import CodegenError
from moec.report import Report
from moec.view.tables import alike, ir_view, pass_diff, passes_view, regions_table, report_view, steps


def inspect_view(
    report: Report, width: int, ir: bool, passes: bool, source: bool, candidates: bool
) -> Iterator[RenderableType]:
    """The parts of the page, in reading order."""
    yield report_view(report, width)
    if candidates:
        yield Rule("candidates", align="left")
        yield regions_table(report) if report.regions else Text("nothing looks like an MoE layer", "dim")
    if ir and report.sites:
        yield Rule("IR", align="left")
        for group in alike(report.sites):
            yield ir_view(group)
    if passes:
        yield Rule("passes", align="left")
        for i, graph in enumerate(report.graph_reports):
            yield from passes_view(graph, i, report.graphs)
    if source:
        yield Rule("kernels", align="left")
        yield from _sources_view(report)


def _sources_view(report: Report) -> Iterator[RenderableType]:
    sources = kernel_sources(report)
    highlighter = Syntax("", "cpp", theme="ansi_dark")
    if not sources:
        yield Text("no kernel: no layer was fused", "dim")
    for spec, text in sources.items():
        yield Text(spec, "bold cyan")
        # As text and not as a rich block, which would pad and cut lines: piped into a file, the source still compiles.
        yield highlighter.highlight(text)


def kernel_sources(report: Report) -> dict[str, str]:
    """Source of each distinct kernel, by its spec's text; the reason in its place where none can be generated."""
    from moec.runtime.ops import kernel_source

    sources: dict[str, str] = {}
    for spec in dict.fromkeys(site.spec for site in report.sites if site.spec):
        try:
            sources[spec] = kernel_source(spec)
        except CodegenError as error:
            sources[spec] = f"// no C++ kernel, the eager twin runs: {error}"
    return sources


def inspect_data(report: Report, passes: bool, source: bool) -> dict[str, Any]:
    """The same for --json: `diffs` with --passes, `sources` with --source."""
    data = report.to_dict(texts=passes)
    if passes:
        data["diffs"] = [
            {"graph": i, "pass": record.name, "diff": pass_diff(before, record)}
            for i, graph in enumerate(report.graph_reports)
            for before, record in steps(graph)
        ]
    if source:
        data["sources"] = kernel_sources(report)
    return data
