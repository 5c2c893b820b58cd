"""How long moec's own passes take: a layer of a deep model, and a node of a graph without experts.

    python benchmarks/matching_time.py                # repeated layers, then a graph without MoE
    python benchmarks/matching_time.py --layers 12,24,48 --nodes 25000,100000

Figures are the process's CPU time, least of the repeats, so that a busy machine does not show. A deep graph is one
captured layer repeated, each time with parameters of its own: Dynamo's trace is no part of what is timed. The proof
is off: of repeated layers it tries the first alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, Shape, plain_layer, write_json
from compile_time import SeparateMoE, numbers
from rich.console import Console
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule

from moec.backend import Backend
from moec.capture.settle import no_loops_left, settle
from moec.compare.view import plain_table
from moec.options import Options
from moec.report import Report

HIDDEN, WIDTH, TOP_K, TOKENS = 64, 32, 8, 13


@dataclass(frozen=True)
class Matching:
    """One graph: CPU seconds in moec's passes, and how many layers they found."""

    what: str
    layers: int
    nodes: int
    seconds: float
    fused: int

    @property
    def each(self) -> str:
        """Per layer, or per 1000 nodes where there is none."""
        if self.layers:
            return f"{1e3 * self.seconds / self.layers:.2f} ms a layer"
        return f"{1e6 * self.seconds / self.nodes:.1f} ms per 1000 nodes"


def stacked(experts: int) -> nn.Module:
    """A loop over stacked weights."""
    return plain_layer(Shape(HIDDEN, WIDTH, experts, TOP_K), torch.float32).requires_grad_(False)


def separate(experts: int) -> nn.Module:
    """A loop over a ModuleList: 3 parameters an expert."""
    return SeparateMoE(HIDDEN, WIDTH, experts, TOP_K).requires_grad_(False)


class Gathered(nn.Module):
    """Straight code: each token's matrices picked from stacked weights."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 2 * WIDTH, HIDDEN))
        self.down = nn.Parameter(torch.randn(experts, HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] → [T, H]."""
        weights, chosen = torch.topk(self.gate(x).softmax(-1), TOP_K, dim=-1)
        a, b = torch.einsum("th,tkfh->tkf", x, self.up[chosen]).chunk(2, dim=-1)
        return torch.einsum("tk,tkh->th", weights, torch.einsum("tkf,tkhf->tkh", F.silu(a) * b, self.down[chosen]))


FORMS: dict[str, Callable[[int], nn.Module]] = {
    "stacked weights, loop": stacked,
    "ModuleList, loop": separate,
    "stacked weights, gathered": lambda experts: Gathered(experts).requires_grad_(False),
}


def captured(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """The graph that Dynamo hands to moec, loops rolled."""
    found: list[fx.GraphModule] = []

    def record(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(gm)
        return lambda *_: [x] * len(gm.graph.output_node().args[0])  # rolled loops stand for no tensors yet

    record.__moec_backend__ = True  # type: ignore[attr-defined]
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=record, dynamic=False)(x)
    (gm,) = found
    return gm


def repeated(gm: fx.GraphModule, layers: int) -> fx.GraphModule:
    """The graph `layers` times in a row; the only output of one is the next one's activation [T, H]."""
    graph = fx.Graph()
    activation = next(n for n in gm.graph.nodes if n.op == "placeholder" and _shape(n) == (TOKENS, HIDDEN))
    x: fx.Node | None = None
    for number in range(layers):
        env: dict[fx.Node, fx.Node] = {}
        for node in gm.graph.nodes:
            if node.op == "output":
                break
            if node is activation and x is not None:
                env[node] = x
                continue
            env[node] = graph.node_copy(node, env.__getitem__)
            if node.op == "placeholder" and node is not activation:
                env[node].target = f"{node.target}_{number}"
        out = gm.graph.output_node().args[0]
        x = env[out[0] if isinstance(out, (tuple, list)) else out]  # type: ignore[index]
    graph.output((x,))
    _placeholders_first(graph)
    graph.lint()
    return _LazyGraphModule(gm, graph)  # as Dynamo hands graphs over: their code is made when it is first run


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("example_value")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _placeholders_first(graph: fx.Graph) -> None:
    with graph.inserting_before(next(iter(graph.nodes))):
        start = graph.placeholder("start")
    at = start
    for node in [n for n in graph.nodes if n.op == "placeholder" and n is not start]:
        at.append(node)
        at = node
    graph.erase_node(start)


def without_experts(nodes: int) -> fx.GraphModule:
    """Blocks of norm, two products with an activation between, and a residual: `nodes` nodes."""
    graph = fx.Graph()
    with FakeTensorMode() as mode:
        wide, x = torch.empty(TOKENS, 2 * HIDDEN), torch.empty(TOKENS, HIDDEN)
        up, down = torch.empty(2 * HIDDEN, HIDDEN), torch.empty(HIDDEN, 2 * HIDDEN)
    assert mode is not None

    def holding(node: fx.Node, value: Tensor) -> fx.Node:
        node.meta["example_value"] = value
        return node

    y = holding(graph.placeholder("x"), x)
    a, b = holding(graph.placeholder("up"), up), holding(graph.placeholder("down"), down)
    for _ in range((nodes - 4) // 5):
        h = holding(graph.call_function(F.layer_norm, (y, (HIDDEN,))), x)
        h = holding(graph.call_function(F.linear, (h, a)), wide)
        h = holding(graph.call_function(F.silu, (h,)), wide)
        h = holding(graph.call_function(F.linear, (h, b)), x)
        y = holding(graph.call_function(torch.add, (y, h)), x)
    graph.output((y,))
    return _LazyGraphModule(nn.Module(), graph)


def passes_seconds(make: Callable[[], fx.GraphModule], repeats: int) -> tuple[float, int, int]:
    """CPU seconds of everything that moec does to the graph (the least of the repeats), its nodes, layers fused."""
    options = Options.make({"rest": "eager", "kernels": "eager", "proof": "off"})
    times: list[float] = []
    nodes = fused = 0
    for _ in range(repeats):
        gm, report = make(), Report()
        nodes = len(gm.graph.nodes)
        start = time.process_time()
        settle(gm)
        Backend(options).rewrite(gm)
        no_loops_left(gm)
        times.append(time.process_time() - start)
    gm, report = make(), Report()
    report.graph_reports.append(Backend(options, report=report).rewrite(gm))
    fused = sum(site.status == "fused" for site in report.sites)
    return min(times), nodes, fused


def layers_time(what: str, experts: int, layers: int, repeats: int = 2) -> Matching:
    """The passes on a deep model."""
    one = captured(FORMS[what](experts), torch.randn(TOKENS, HIDDEN))
    seconds, nodes, fused = passes_seconds(lambda: repeated(one, layers), repeats)
    return Matching(what, layers, nodes, seconds, fused)


def plain_time(nodes: int, repeats: int = 2) -> Matching:
    """The passes on a graph without experts."""
    seconds, count, fused = passes_seconds(lambda: without_experts(nodes), repeats)
    return Matching("no MoE", 0, count, seconds, fused)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=numbers, default=[12, 24, 48], help="layers of the deep models")
    parser.add_argument("--nodes", type=numbers, default=[25_000, 50_000, 100_000], help="nodes without MoE")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "matching_time.json")
    asked = parser.parse_args(arguments)
    found: list[Matching] = []
    for what in FORMS:
        found += [layers_time(what, asked.experts, layers, asked.repeats) for layers in asked.layers]
    found += [plain_time(nodes, asked.repeats) for nodes in asked.nodes]
    table = plain_table("CPU seconds in moec's passes")
    for name in ("graph", "layers", "nodes", "seconds", "", "fused"):
        table.add_column(name, justify="left" if name == "graph" else "right")
    for one in found:
        layers = str(one.layers or "–")
        table.add_row(one.what, layers, str(one.nodes), f"{one.seconds:.3f}", one.each, str(one.fused))
    Console().print(table)
    write_json("matching_time", {"matching": [asdict(one) for one in found]}, asked.out)


if __name__ == "__main__":
    main()
