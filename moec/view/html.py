"""The report as one self-contained HTML page: no script, no font, no style sheet from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import jinja2

from moec.report import Report
from moec.view.tables import Alike, alike, pass_diff, pass_title, short_place, steps

DIFF_STYLES = {"+++": "meta", "---": "meta", "@@": "meta", "+": "add", "-": "del"}


@dataclass(frozen=True)
class StepView:
    """One pass as the page shows it; `lines` are (css class, text) of its diff, `text` the whole graph of the first."""

    title: str
    lines: tuple[tuple[str, str], ...]
    text: str


@dataclass(frozen=True)
class GraphView:
    """One graph's steps."""

    nodes: int
    steps: tuple[StepView, ...]


def page(report: Report) -> str:
    """The page's text; everything from the report is escaped."""
    groups = alike(report.sites)
    graphs = tuple(_graph_views(report))
    fused = sum(site.status == "fused" for site in report.sites)
    return _template().render(report=report, groups=groups, graphs=graphs, fused=fused, title=_title(groups))


def _title(groups: list[Alike]) -> str:
    return f"moec: {groups[0].name}" if groups else "moec: no MoE layer found"


def _graph_views(report: Report) -> list[GraphView]:
    views: list[GraphView] = []
    for graph in report.graph_reports:
        shown = [
            StepView(pass_title(before, record), _diff_lines(pass_diff(before, record)), "" if before else record.text)
            for before, record in steps(graph)
        ]
        views.append(GraphView(graph.nodes, tuple(shown)))
    return views


def _diff_lines(diff: str) -> tuple[tuple[str, str], ...]:
    return tuple((_style(line), line) for line in diff.splitlines())


def _style(line: str) -> str:
    return next((style for mark, style in DIFF_STYLES.items() if line.startswith(mark)), "")


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    source = files("moec.view").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["place"] = short_place
    return environment.from_string(source)
