"""An interpreter of canonical words, and the check that a raised graph means what the torch graph computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from moec.ir.dtypes import GRAPH_DTYPES
from moec.ir.graph import Instr, Ref
from moec.ir.text import dump
from moec.passes.raising.raise_graph import Raised
from moec.passes.raising.vocabulary import raise_fx
from moec.passes.raising.words import BINARY, UNARY


class Unknown:
    """A value that only torch can say: random, uninitialised, or a view of changed storage."""


UNKNOWN = Unknown()


def capture(fn, *args, dynamic=False) -> tuple[fx.GraphModule, list[Any]]:
    """The one graph that Dynamo makes of fn(*args), and the values of its inputs."""
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def recorder(gm, example_inputs):
        graphs.append((gm, list(example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        torch.compile(fn, backend=recorder, dynamic=dynamic)(*copies(args))
    assert len(graphs) == 1, f"{len(graphs)} graphs"
    return graphs[0][0], graphs[0][1]


def copies(args):
    return [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]


def raised_text(fn, *args) -> str:
    """The raised graph without places."""
    graph = raise_fx(capture(fn, *args)[0]).graph
    return dump(graph.with_instrs(replace(i, loc="") for i in graph.instrs))


def words(fn, *args) -> list[str]:
    return [i.word for i in raise_fx(capture(fn, *args)[0]).graph.instrs]


class Recorder(fx.Interpreter):
    """Runs a torch graph and keeps what every node held when it was made, and what it holds at the end."""

    def __init__(self, gm):
        super().__init__(gm, garbage_collect_values=False)
        self.made: dict[fx.Node, Any] = {}

    def run_node(self, n):
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.made[n] = result.detach().clone()
        return result


class Words:
    """Runs a raised graph by the meaning of its words."""

    def __init__(self, gm: fx.GraphModule):
        self.nodes = {n.name: n for n in gm.graph.nodes}
        self.sizes: dict[sympy.Symbol, int] = {}

    def run(self, raised: Raised, inputs: dict[str, Any]) -> dict[str, Any]:
        values = dict(inputs)
        for name, kind in raised.graph.inputs:
            self.bind(kind, values[name])
        for instr in raised.graph.instrs:
            found = self.evaluate(instr, values)
            results = found if isinstance(found, (tuple, list)) and len(instr.results) > 1 else (found,)
            for name, kind, value in zip(instr.results, instr.types, results, strict=True):
                if isinstance(value, torch.Tensor) and kind.dtype in GRAPH_DTYPES:
                    self.bind(kind, value)
                    assert tuple(value.shape) == self.shape(kind), f"{instr}: {tuple(value.shape)}"
                    value = value.to(GRAPH_DTYPES[kind.dtype])
                values[name] = value
        return values

    def bind(self, kind, value):
        if isinstance(value, torch.Tensor):
            for dim, size in zip(kind.shape, value.shape, strict=False):
                if dim.is_Symbol:
                    self.sizes[dim] = size

    def shape(self, kind) -> tuple[int, ...]:
        return tuple(int(d.subs(self.sizes)) for d in kind.shape)

    def evaluate(self, instr: Instr, values: dict[str, Any]) -> Any:
        def of(arg):
            if isinstance(arg, Ref):
                return values[arg.name]
            return [of(a) for a in arg] if isinstance(arg, tuple) else arg

        args = [of(a) for a in instr.args]
        flat = [x for a in args for x in (a if isinstance(a, list) else [a])]
        if any(isinstance(a, Unknown) for a in flat) or instr.word in (
            ["changed_view", "changed", "random", "effect", "assert", "size", "end"]
        ):
            return (UNKNOWN,) * len(instr.results) if len(instr.results) > 1 else UNKNOWN
        if instr.word == "opaque":
            return self.opaque(instr, args)
        attrs = dict(instr.attrs)
        return meaning_of(instr, args, attrs, None if instr.types[0].dtype == "any" else self.shape_or_none(instr))

    def shape_or_none(self, instr):
        known = all(d.free_symbols <= set(self.sizes) for d in instr.types[0].shape)
        return self.shape(instr.types[0]) if known else None

    def opaque(self, instr: Instr, args: list[Any]) -> Any:
        node = self.nodes[instr.results[0].partition(".")[0]]

        def fill(template, value):
            if isinstance(template, fx.Node):
                return value.clone() if isinstance(value, torch.Tensor) else value
            if isinstance(template, (tuple, list)):
                return type(template)(fill(t, v) for t, v in zip(template, value, strict=True))
            return template

        count = len(node.args)
        given = [fill(t, v) for t, v in zip(node.args, args[:count], strict=True)]
        kwargs = {k: fill(t, v) for (k, t), v in zip(node.kwargs.items(), args[count:], strict=True)}
        if node.op == "call_method":
            return getattr(given[0], node.target)(*given[1:], **kwargs)
        result = node.target(*given, **kwargs)
        return given[0] if result is None else result


REDUCE = {
    "reduce_sum": torch.sum,
    "reduce_mean": torch.mean,
    "reduce_amax": torch.amax,
    "reduce_amin": torch.amin,
    "reduce_any": torch.any,
    "reduce_all": torch.all,
    "reduce_prod": torch.prod,
}
SPECIAL = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "softplus": F.softplus,
    "relu": F.relu,
    "invert": torch.bitwise_not,
    "clamp_min": lambda x, m: torch.clamp(x, min=m),
    "clamp_max": lambda x, m: torch.clamp(x, max=m),
    "mod": torch.remainder,
}


def meaning_of(instr: Instr, args: list[Any], attrs: dict[str, Any], shape) -> Any:
    """What the word means, in torch."""
    word = instr.word
    if word in SPECIAL:
        return SPECIAL[word](*args)
    if word == "truncate_divide":
        return torch.div(*args, rounding_mode="trunc")
    if word in UNARY or word in BINARY:
        return pointwise(word, args)
    if word in REDUCE:
        x = args[0]
        for dim in sorted(attrs["dims"], reverse=True):
            x = REDUCE[word](x, dim=dim, keepdim=attrs["keepdim"])
        return x
    dtype = GRAPH_DTYPES.get(instr.types[0].dtype)
    return STRUCTURE[word](args, attrs, shape, dtype)


def pointwise(word: str, args: list[Any]) -> Any:
    if not any(isinstance(a, torch.Tensor) for a in args):
        return UNKNOWN  # arithmetic of sizes
    first = args[0] if isinstance(args[0], torch.Tensor) else torch.tensor(args[0], dtype=args[1].dtype)
    return getattr(torch, word)(first, *args[1:])


def index_put(args, attrs):
    base, value, *ids = args
    value = torch.as_tensor(value, dtype=base.dtype)
    assert attrs["dim"] == 0
    return base.index_put(tuple(ids), value, attrs["accumulate"])


def index(args, attrs):
    base, *ids = args
    return base[(*[slice(None)] * attrs["dim"], *ids)]


def grouped(args):
    x, w, ends = args
    starts = [0, *ends.tolist()[:-1]]
    return torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(zip(starts, ends.tolist(), strict=True))])


def scatter(args, attrs):
    return args[0].scatter(attrs["dim"], args[1], args[2])


def take_slice(args, attrs):
    return args[0][(*[slice(None)] * attrs["dim"], slice(attrs["start"], attrs["stop"], attrs["step"]))]


STRUCTURE = {
    "reshape": lambda a, at, s, d: a[0].reshape(s),
    "permute": lambda a, at, s, d: a[0].permute(at["dims"]),
    "slice": lambda a, at, s, d: take_slice(a, at),
    "expand": lambda a, at, s, d: a[0].expand(s),
    "repeat": lambda a, at, s, d: a[0].tile(at["reps"]) if len(at["reps"]) < a[0].dim() else a[0].repeat(at["reps"]),
    "repeat_interleave": lambda a, at, s, d: a[0].repeat_interleave(at["repeats"], at["dim"]),
    "cat": lambda a, at, s, d: torch.cat(a[0], at["dim"]),
    "stack": lambda a, at, s, d: torch.stack(a[0], at["dim"]),
    "cast": lambda a, at, s, d: a[0].to(GRAPH_DTYPES[at["dtype"]]),
    "same": lambda a, at, s, d: a[0],
    "detach": lambda a, at, s, d: a[0],
    "softmax": lambda a, at, s, d: a[0].softmax(at["dim"]),
    "cumsum": lambda a, at, s, d: a[0].cumsum(at["dim"]),
    "max": lambda a, at, s, d: tuple(a[0].max(at["dim"], at["keepdim"])),
    "topk": lambda a, at, s, d: tuple(a[0].topk(at["k"], at["dim"], at["largest"], at["sorted"])),
    "sort": lambda a, at, s, d: tuple(torch.sort(a[0], at["dim"], at["descending"])),
    "full": lambda a, at, s, d: UNKNOWN if at["value"] is None else torch.full(s, at["value"]),
    "arange": lambda a, at, s, d: torch.arange(s[0]),
    "counts": lambda a, at, s, d: torch.bincount(a[0].reshape(-1).long(), minlength=at["bins"]),
    "masked_fill": lambda a, at, s, d: a[0].masked_fill(a[1], a[2]),
    "where": lambda a, at, s, d: torch.where(*a),
    "where_indices": lambda a, at, s, d: torch.where(a[0]) if a[0].dim() > 1 else torch.where(a[0])[0],
    "nonzero": lambda a, at, s, d: a[0].nonzero(),
    "unique": lambda a, at, s, d: torch.unique(a[0]),
    "index": lambda a, at, s, d: index(a, at),
    "gather": lambda a, at, s, d: a[0].gather(at["dim"], a[1]),
    "scatter": lambda a, at, s, d: scatter(a, at),
    "scatter_add": lambda a, at, s, d: a[0].scatter_add(at["dim"], a[1], a[2]),
    "index_add": lambda a, at, s, d: a[0].index_add(at["dim"], a[1], a[2]),
    "index_copy": lambda a, at, s, d: a[0].index_copy(at["dim"], a[1], a[2]),
    "index_put": lambda a, at, s, d: index_put(a, at),
    "one_hot": lambda a, at, s, d: F.one_hot(a[0], at["classes"]),
    "contract": lambda a, at, s, d: torch.einsum(at["eq"], a[0], a[1]),
    "grouped": lambda a, at, s, d: grouped(a),
}


def check(fn, *args, dynamic=False) -> set[str]:
    """Assert that every node's value, and what each holds at the end, is what the raised graph says; the words used."""
    gm, given = capture(fn, *args, dynamic=dynamic)
    raised = raise_fx(gm)
    placeholders = [n for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")]
    ours = dict(zip((n.name for n in placeholders), copies(given), strict=True))
    with torch.no_grad():
        recorder = Recorder(gm)
        recorder.run(*copies(given))
        values = Words(gm).run(raised, ours)
    text = dump(raised.graph)
    held = histories(raised)
    known = 0
    for node, steps in held.items():
        made_at = raised.order[node]
        at_birth = [name for name, since in steps if since == made_at]
        if at_birth and node in recorder.made:
            what = f"%{at_birth[-1]} for {node.format_node()}\n{text}"
            known += same(values[at_birth[-1]], recorder.made[node], what)
        end = recorder.env.get(node)
        if isinstance(end, torch.Tensor):
            known += same(values[steps[-1][0]], end, f"%{steps[-1][0]} at the end for {node.format_node()}\n{text}")
    assert known
    for node in placeholders:
        assert held[node][-1][0] == node.name or held[node][-1][0] in raised.graph.outputs
    return {i.word for i in raised.graph.instrs}


def histories(raised: Raised) -> dict[fx.Node, list[tuple[str, int]]]:
    """What each node stands for, and from when."""
    found: dict[fx.Node, list[tuple[str, int]]] = {}
    for name, carriers in raised.carriers.items():
        for node, since in carriers:
            found.setdefault(node, []).append((name, since))
    return {node: sorted(steps, key=lambda s: s[1]) for node, steps in found.items()}


def same(ours: Any, theirs: torch.Tensor, what: str) -> bool:
    if not isinstance(ours, torch.Tensor):
        return False
    assert ours.shape == theirs.shape, f"{what}\nshapes {tuple(ours.shape)} {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}\ndtypes {ours.dtype} {theirs.dtype}"
    a, b = ours.detach(), theirs.detach()
    tolerance = 1e-2 if a.dtype in (torch.bfloat16, torch.float16) else 1e-5
    close = torch.allclose(a.double(), b.double(), tolerance, tolerance, equal_nan=True)
    assert close, f"{what}\nvalues {ours}\n{theirs}"
    return True
