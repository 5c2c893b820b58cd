"""The report as tables for people: rich renderables, and plain text for `print(report)`."""

from __future__ import annotations

import difflib
import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moec.report import GraphReport, PassRecord, Report, Site
from moec.view.fitting import FittingTable

FIRST_TEXT = 400  # lines of the raised graph that are still shown before the diffs
WIDE = 110  # columns from which router, experts and kernels each get a column of their own
PIPED_WIDTH = 120  # nobody's window: wide enough for the wide table, narrow enough for a log
DIFF_STYLES = {"+++": "dim", "---": "dim", "@@": "dim", "+": "green", "-": "red"}
STATUS_STYLE = {"fused": "green", "declined": "yellow"}


@dataclass(frozen=True)
class Alike:
    """Sites that differ in nothing but their number: the 48 layers of one model are one line."""

    sites: tuple[Site, ...]

    @property
    def first(self) -> Site:
        """The one that stands for all."""
        return self.sites[0]

    @property
    def name(self) -> str:
        """`model.layers.0.mlp … model.layers.47.mlp (48 layers)`."""
        if len(self.sites) == 1:
            return self.first.name
        return f"{self.first.name} … {self.sites[-1].name} ({len(self.sites)} layers)"


def alike(sites: Iterable[Site]) -> list[Alike]:
    """Sites grouped with their twins, in order of first appearance."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        pattern = re.sub(r"\d+", "#", site.name)
        understood = (site.form, site.router, site.experts, site.num_experts, site.top_k, site.capacity, site.spec)
        key = (pattern, site.status, understood, site.kernels, site.reasons)
        groups.setdefault(key, []).append(site)
    return [Alike(tuple(group)) for group in groups.values()]


def headline(report: Report) -> Text:
    """What was found and done, in one line."""
    fused = sum(site.status == "fused" for site in report.sites)
    declined = len(report.sites) - fused
    counts = [
        _count(report.graphs, "graph"),
        _count(len(report.graph_breaks), "graph break"),
        f"{_count(len(report.sites), 'MoE layer')} found",
        f"{fused} fused",
        f"{declined} declined",
        f"{1e3 * report.seconds:.0f} ms in moec's own passes",
    ]
    good = report.complete
    return Text.assemble(
        ("moec  ", "bold"), ("✓ " if good else "! ", "green" if good else "yellow"), " · ".join(counts)
    )


def report_view(report: Report, width: int) -> RenderableType:
    """The whole report: headline, table of layers, reasons, graph breaks and loops that stayed loops."""
    parts: list[RenderableType] = [headline(report)]
    groups = alike(report.sites)
    if groups:
        parts.append(sites_table(groups, wide=width >= WIDE))
    parts.extend(_reasons(group) for group in groups if group.first.reasons and group.first.status == "fused")
    parts.extend(ladder(group) for group in alike(report.near_misses))
    if not groups:
        parts.append(Text("no MoE layer was found: the model runs as it would with the rest compiler alone", "yellow"))
        seen = [(r.chosen if r.chosen != "–" else r.experts, r) for r in report.regions]
        looked = [f"{what}: {r.why}  at {short_place(r.location)}" for what, r in seen if what != "–"]
        parts.extend(_bullets("looked at", _counted(looked)))
    parts.extend(_proofs(report, groups))
    parts.extend(_bullets("experts over ranks", [f"{g.name}: {g.first.ranks}" for g in groups if g.first.ranks]))
    breaks = [f"{_brief(reason)}  at {short_place(where)}" for reason, where in report.graph_breaks]
    parts.extend(_bullets("graph breaks (one graph is the aim)", _counted(breaks)))
    parts.extend(_bullets("loops over experts that were not rolled", map(str, report.not_rolled)))
    parts.extend(_bullets("copies of weights", _counted(map(str, report.packed))))
    parts.extend(_bullets("notes", dict.fromkeys(note for graph in report.graph_reports for note in graph.notes)))
    return Group(*parts)


def sites_table(groups: Iterable[Alike], wide: bool) -> Table:
    """One row a group of like sites."""
    table = FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=False, padding=(0, 1))
    table.add_column("layer", overflow="fold", ratio=2 if wide else None)
    table.add_column("status", no_wrap=True)
    for letter in ("E", "k"):
        table.add_column(letter, justify="right", no_wrap=True)
    names = ("form", "router", "experts", "kernels") if wide else ("understood as",)
    for name in names:
        table.add_column(name, overflow="fold")
    for group in groups:
        site = group.first
        cells = (site.form, site.router, site.experts, "\n".join(site.kernels) or "–")
        texts = [Text(cell) for cell in cells] if wide else [Text("\n".join(cells))]
        name = Text(group.name).append(f"\n{short_place(site.location)}" if site.location else "", "dim")
        status = Text(site.status, STATUS_STYLE.get(site.status, "red"))
        table.add_row(name, status, str(site.num_experts or "?"), str(site.top_k or "?"), *texts)
    return table


def short_place(location: str) -> str:
    """`file:line` without the part of the path that says nothing: the current folder, or that of packages."""
    inside = location.partition("site-packages/")[2]
    return inside or location.removeprefix(f"{Path.cwd()}{os.sep}")


def _reasons(group: Alike) -> Text:
    text = Text()
    for reason in group.first.reasons:
        text.append(f"{group.first.name}: ", "bold").append(f"{reason.predicate}")
        text.append(f": {reason.value}" if reason.value else "")
        text.append(f"\n    at {short_place(reason.location)}" if reason.location else "", "dim")
        text.append(f"\n    to change it: {reason.hint}" if reason.hint else "", "cyan")
        text.append("\n")
    text.rstrip()
    return text


def _proofs(report: Report, groups: Iterable[Alike]) -> Iterator[Text]:
    """What is known about each rewrite, and what finding out has cost in this compile."""
    lines = [(group, group.first.proof) for group in groups if group.first.proof]
    if lines:
        yield Text(f"rewrites ({report.proof_seconds:.2f} s):", "bold")
    for group, proof in lines:
        yield Text(f"  - {group.name}: {proof}", "" if proof.startswith("proved") else "yellow")


def ladder(group: Alike) -> Text:
    """A declined layer: which predicates held, the first that failed, the value seen, and what to change."""
    site = group.first
    text = Text.assemble((f"{group.name}: ", "bold"), f"not fused, {_count(site.held, 'predicate')} held")
    for check in site.checks:
        mark, style = ("✓", "green") if check.held else ("✗", "yellow")
        text.append(f"\n  {mark} ", style).append(check.predicate)
        text.append(f": {check.value}" if check.value else "")
        text.append(f"\n      at {short_place(check.location)}" if check.location else "", "dim")
    for reason in site.reasons:
        if not site.checks:
            text.append(f"\n  ✗ {reason.predicate}").append(f": {reason.value}" if reason.value else "")
            text.append(f"\n      at {short_place(reason.location)}" if reason.location else "", "dim")
        text.append(f"\n    to change it: {reason.hint}" if reason.hint else "", "cyan")
    return text


def regions_table(report: Report) -> Table:
    """Every region that was looked at, fused, declined or rejected."""
    table = FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for name in ("region", "status", "chosen", "experts", "why"):
        table.add_column(name, overflow="fold", no_wrap=name == "status")
    for region in report.regions:
        name = Text(region.name).append(f"\n{short_place(region.location)}" if region.location else "", "dim")
        status = Text(region.status, STATUS_STYLE.get(region.status, "dim"))
        table.add_row(name, status, Text(region.chosen), Text(region.experts), Text(region.why))
    return table


def _brief(reason: str) -> str:
    """What broke and Dynamo's explanation of it, without its hints, links and debug context."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    explained = [line for line in lines[1:] if line.startswith("Explanation:")]
    return "; ".join((*lines[:1], *explained[:1]))


def _counted(lines: Iterable[str]) -> Iterator[str]:
    """Each line once, with the number of times it occurred."""
    for line, times in Counter(lines).items():
        yield f"{line}  ({times} times)" if times > 1 else line


def _bullets(title: str, lines: Iterable[str]) -> Iterator[Text]:
    listed = list(lines)
    if listed:
        yield Text(f"{title}:", "bold")
        yield from (Text(f"  - {line}") for line in listed)


def render_text(report: Report, width: int | None = None) -> str:
    """The report as plain text, `width` columns wide (default: the terminal, 120 where there is none)."""
    width = width or shutil.get_terminal_size(fallback=(PIPED_WIDTH, 24)).columns
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, force_terminal=False, highlight=False, emoji=False)
    console.print(report_view(report, width))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def ir_view(group: Alike) -> Text:
    """A site's block of IR, with a note for its twins."""
    if not group.first.ir:
        return Text(f"{group.name}: no IR, the layer was declined before it was understood", "dim")
    more = len(group.sites) - 1
    return Text(group.first.ir.rstrip()).append(f"\n  ({more} more like it)" if more else "", "dim")


def pass_diff(before: PassRecord | None, after: PassRecord, context: int = 2) -> str:
    """Unified diff of the graph's text across one pass; empty where the pass changed nothing or was the first."""
    if before is None or before.text == after.text:
        return ""
    lines = difflib.unified_diff(
        before.text.splitlines(),
        after.text.splitlines(),
        f"before {after.name}",
        f"after {after.name}",
        "",
        "",
        context,
        "",
    )
    return "\n".join(lines)


def pass_title(before: PassRecord | None, after: PassRecord) -> str:
    """`fuse_router: 2 rewrites, 1.3 ms, 120 lines → 98 lines`."""
    size = len(after.text.splitlines())
    lines = _count(size, "line") if before is None else f"{len(before.text.splitlines())} → {_count(size, 'line')}"
    return f"{after.name}: {_count(after.rewrites, 'rewrite')}, {after.milliseconds:.1f} ms, {lines}"


def steps(graph: GraphReport) -> Iterator[tuple[PassRecord | None, PassRecord]]:
    """Each pass's record with the one before it; the first (raise) has none."""
    before: PassRecord | None = None
    for record in graph.passes:
        yield before, record
        before = record


def passes_view(graph: GraphReport, number: int, count: int) -> Iterator[RenderableType]:
    """What each pass changed, as coloured unified diffs."""
    yield Text(f"graph {number + 1} of {count}: {_count(graph.nodes, 'node')} captured", "bold")
    for before, record in steps(graph):
        yield Text(pass_title(before, record), "bold cyan")
        diff = pass_diff(before, record)
        if before is None:
            yield Text(
                record.text.rstrip() if record.text.count("\n") < FIRST_TEXT else "  (long: --json has it)", "dim"
            )
        if diff:
            yield Text("\n").join(Text(line, diff_style(line)) for line in diff.splitlines())


def diff_style(line: str) -> str:
    """The colour of one line of a unified diff."""
    return next((style for mark, style in DIFF_STYLES.items() if line.startswith(mark)), "")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
