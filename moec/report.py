"""What moec found and did, as plain values: the Report that `moec.explain` returns and the command line prints."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Reason:
    """Why a site is as it is: the predicate, the value seen, where in the user's code, and what to change."""

    predicate: str
    value: str = ""
    location: str = ""
    hint: str = ""

    def __str__(self) -> str:
        where = f" at {self.location}" if self.location else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.predicate}{f': {self.value}' if self.value else ''}{where}{hint}"


@dataclass(frozen=True)
class Check:
    """One predicate of a match: what must hold, whether it did, the value seen, and where in the user's code."""

    predicate: str
    held: bool
    value: str = ""
    location: str = ""


@dataclass(frozen=True)
class Region:
    """A part of a graph that was looked at as a possible MoE layer, whatever came of it.

    status  fused | declined | rejected: something is chosen or has an axis of experts, but it is no MoE layer
    """

    name: str
    status: str
    chosen: str
    experts: str
    why: str
    location: str = ""


@dataclass(frozen=True)
class Site:
    """One MoE layer found or nearly found, in execution order.

    checks   of a declined layer: the predicates in order; all but the last held
    choice   of a layer without an op of moec's: the captured graph's nodes that hold the chosen experts, where seen
    tokens   the range of T that buffers are taken for, `1..4096`; empty where none is known
    ranks    which ranks compute its experts, or why they are not spread; empty where that was not asked for
    """

    name: str
    status: str  # fused | declined
    form: str
    router: str
    experts: str
    num_experts: int
    top_k: int
    capacity: str
    kernels: tuple[str, ...]
    reasons: tuple[Reason, ...]
    location: str = ""
    ir: str = ""
    spec: str = ""
    proof: str = ""  # proved in 0.12 s: …| proved before: … | unproved: why | off
    checks: tuple[Check, ...] = ()
    choice: tuple[str, ...] = ()
    tokens: str = ""
    ranks: str = ""

    @property
    def held(self) -> int:
        """How many predicates held: the more, the nearer a declined layer is to being fused."""
        return sum(check.held for check in self.checks)


@dataclass(frozen=True)
class PassRecord:
    """One pass's run over one graph: how often it rewrote, how long it took, the graph's text after it."""

    name: str
    rewrites: int
    milliseconds: float
    text: str


@dataclass(frozen=True)
class GraphReport:
    """What happened to one captured graph."""

    sites: tuple[Site, ...]
    passes: tuple[PassRecord, ...]
    nodes: int
    notes: tuple[str, ...] = ()
    proof_seconds: float = 0.0
    regions: tuple[Region, ...] = ()
    rewrites: tuple[str, ...] = ()


@dataclass(frozen=True)
class PackRecord:
    """One copy of a layer's expert weights: bytes of both, seconds, and error = ‖copy - weights‖ / ‖weights‖."""

    weights: str
    experts: int
    stored_bytes: int
    packed_bytes: int
    seconds: float
    error: float

    def __str__(self) -> str:
        sizes = f"{self.stored_bytes / 1e6:.1f} MB of weights copied into {self.packed_bytes / 1e6:.1f} MB"
        return f"weights={self.weights}: {sizes} in {self.seconds:.2f} s, relative error {self.error:.2g}"


@dataclass(repr=False)
class Report:
    """Everything moec did for one compiled model; grows as Dynamo hands over graphs. `print(report)` is a table."""

    graph_reports: list[GraphReport] = field(default_factory=list)
    graph_breaks: list[tuple[str, str]] = field(default_factory=list)
    not_rolled: list[Reason] = field(default_factory=list)
    seconds: float = 0.0
    packed: list[PackRecord] = field(default_factory=list)

    @property
    def graphs(self) -> int:
        """FX graphs captured; 1 is the aim."""
        return len(self.graph_reports)

    @property
    def sites(self) -> list[Site]:
        """All sites, in execution order."""
        return [site for graph in self.graph_reports for site in graph.sites]

    @property
    def proof_seconds(self) -> float:
        """What the proofs of the rewrites cost in this compile."""
        return sum(graph.proof_seconds for graph in self.graph_reports)

    @property
    def rewrites(self) -> list[str]:
        """All rewrites in the order in which they were made: what fuel counts."""
        return [rewrite for graph in self.graph_reports for rewrite in graph.rewrites]

    @property
    def regions(self) -> list[Region]:
        """All regions that were looked at, in execution order."""
        return [region for graph in self.graph_reports for region in graph.regions]

    @property
    def near_misses(self) -> list[Site]:
        """The declined layers, the one closest to being fused first."""
        declined = [site for site in self.sites if site.status != "fused"]
        return sorted(declined, key=lambda site: -site.held)

    @property
    def complete(self) -> bool:
        """True when something was found and all of it is fused, in one graph."""
        whole = self.graphs == 1 and not self.graph_breaks and not self.not_rolled
        return whole and bool(self.sites) and all(site.status == "fused" for site in self.sites)

    def to_dict(self, texts: bool = True) -> dict[str, Any]:
        """Plain data, for JSON and tests. `texts` False leaves out the graphs' texts, which may be megabytes."""
        return {
            "graphs": self.graphs,
            "graph_breaks": self.graph_breaks,
            "not_rolled": [asdict(r) for r in self.not_rolled],
            "seconds": self.seconds,
            "packed": [asdict(p) for p in self.packed],
            "proof_seconds": self.proof_seconds,
            "complete": self.complete,
            "sites": [asdict(s) for s in self.sites],
            "candidates": [asdict(r) for r in self.regions],
            "notes": [note for graph in self.graph_reports for note in graph.notes],
            "passes": [
                {"graph": i, **_pass_dict(record, texts)}
                for i, g in enumerate(self.graph_reports)
                for record in g.passes
            ],
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one self-contained page; returns its path."""
        from moec.view.html import page  # the page's machinery is loaded only when somebody asks for a page

        path = Path(path)
        path.write_text(page(self), encoding="utf-8")
        return path

    def __str__(self) -> str:
        from moec.view.tables import render_text

        return render_text(self)

    def __repr__(self) -> str:
        fused = sum(site.status == "fused" for site in self.sites)
        return f"Report(graphs={self.graphs}, sites={len(self.sites)}, fused={fused}, seconds={self.seconds:.2f})"


def _pass_dict(record: PassRecord, texts: bool) -> dict[str, Any]:
    values = asdict(record)
    return values if texts else {name: value for name, value in values.items() if name != "text"}
