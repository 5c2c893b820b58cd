"""One MoE layer, a training step (forward and backward): moec beside the library's implementations, time and memory.

    python benchmarks/train.py                                   # layers A and B, fp32 and bf16, 512 and 2048 tokens
    python benchmarks/train.py --quick                           # layer A, fp32, 512 tokens
    python benchmarks/train.py --layers B --tokens 512 --dtypes f32 --inductor

The gradients of x, the router and both weights are compared with an fp32 reference before anything is timed. Ways are
timed in turns; a cell is the median of its steps. The limit is max(arithmetic / GEMM peak, bytes / read bandwidth),
both measured in the run: nine products a choice (three forward, six backward); the weights of the experts hit read
twice and every gradient written once. Memory is what a step adds to the process's resident memory at its peak.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from common import (
    LAYERS,
    Raced,
    Shape,
    add_race,
    check_names,
    layer_inputs,
    library_block,
    plain_layer,
    race_layers,
    wanted,
    write_race,
)
from rich.console import Console
from torch import Tensor

from moec.compare.measure import Layer, environment_line
from moec.compare.view import plain_table
from moec.compare.ways import MOEC, Row, Way
from moec.compare.worker import Built
from moec.demo.check import TOLERANCE, relative_error
from moec.demo.forms import MoE
from moec.ir.dtypes import DTYPES
from moec.runtime.calls import calls
from moec.runtime.gradients import gradient_memory

GRADIENTS = ("x", "router", "gate_up", "down")


@dataclass(frozen=True)
class Training(Layer):
    """A training step's arithmetic and memory traffic."""

    def flops(self, tokens: int) -> float:
        """Forward once, and twice as much backward: by inputs and by weights."""
        return 3.0 * super().flops(tokens)

    def bytes_read(self, active: int) -> float:
        """Weights of the experts hit for forward and for backward, and the gradients of all, as many bytes written."""
        return 2.0 * super().bytes_read(active) + super().bytes_read(self.experts)


@dataclass(frozen=True)
class Peak:
    """Megabytes that one step adds at its peak, its gradients among them; the gradients alone."""

    way: str
    tokens: int
    extra_mb: float
    gradients_mb: float


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cost = {"repeats": 7, "budget": 180.0, "seconds": 60.0, "patience": 20.0}
    add_race(parser, "train", tokens="512,2048", dtypes="f32,bf16", **cost)
    parser.add_argument("--inductor", action="store_true", help="also Inductor's compilation of the grouped_mm form")
    parser.add_argument("--no-memory", action="store_true", help="leave memory out")
    parser.add_argument("--quick", action="store_true", help="layer A, f32, 512 tokens, short budgets")
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.layers, asked.tokens, asked.dtypes = "A", "512", "f32"
        asked.budget, asked.seconds, asked.repeats = 60.0, 20.0, 3
    check_names(parser, asked, layers=LAYERS, dtypes=DTYPES)
    return asked


def output_gradient(plain: MoE, x: Tensor) -> Tensor:
    """The gradient of y [T, H] that a step starts from; zero for tokens whose choice of experts hangs on rounding."""
    torch.manual_seed(2)
    return torch.randn(x.shape).to(x.dtype) * wanted(plain, x).clear[:, None]


def reference(plain: MoE, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients in fp32, in the order of GRADIENTS, for the choice of experts that x's dtype makes."""
    chosen = plain.gate(x).topk(plain.top_k).indices
    leaves = (x, plain.gate.weight, plain.experts.gate_up, plain.experts.down)
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    rows, router, gate_up, down = wide
    with torch.enable_grad():
        scores = nnf.softmax(rows @ router.t(), dim=-1).gather(-1, chosen)
        weights = scores / scores.sum(-1, keepdim=True)
        up, out = gate_up.unbind(0), down.unbind(0)
        y = torch.zeros_like(rows)
        for expert in chosen.unique().tolist():
            token, slot = torch.where(chosen == expert)
            a, b = nnf.linear(rows[token], up[expert]).chunk(2, dim=-1)
            y = y.index_add(0, token, nnf.linear(nnf.silu(a) * b, out[expert]) * weights[token, slot, None])
    return torch.autograd.grad(y, wide, grad.float())


def build(shape: Shape, dtype: str, tokens: tuple[int, ...], implementation: str, backend: str) -> Built:
    """One way, in its own process; backend '': eager."""
    plain, inputs = plain_layer(shape, DTYPES[dtype]), layer_inputs(shape, DTYPES[dtype], tokens)
    block = library_block(shape, implementation, plain).train()
    params = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    grads = {id(x): output_gradient(plain, x) for x in inputs.values()}
    for param in params:
        param.requires_grad_()
    call = torch.compile(block, backend=backend) if backend else block

    def step(x: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = call(leaf[None])
            (y[0] if isinstance(y, tuple) else y).backward(grads[id(x)][None])
            found = (leaf.grad, *(param.grad for param in params))
        for param in params:
            param.grad = None
        return found

    def wrong(t: int, found: tuple[Tensor, ...]) -> str:
        for param in params:
            param.requires_grad_(False)
        exact = reference(plain, inputs[t], grads[id(inputs[t])])
        for param in params:
            param.requires_grad_()
        # Rounding in forward and in backward.
        return verdict(found, exact, 3 * TOLERANCE[DTYPES[dtype]])

    return Built(step, inputs, wrong)


def verdict(found: Sequence[Tensor], exact: Sequence[Tensor], allowed: float) -> str:
    """Empty where all gradients are right, else which is how wrong."""
    errors = {name: relative_error(f, e) for name, f, e in zip(GRADIENTS, found, exact, strict=True)}
    worst = max(errors, key=errors.__getitem__)
    if errors[worst] <= allowed:
        return ""
    return f"WRONG: relative error {errors[worst]:.1e} of the gradient of {worst}, allowed {allowed:.0e}"


def ways(shape: Shape, dtype: str, tokens: tuple[int, ...], inductor: bool) -> list[Way]:
    """moec on the library's eager form, then the alternatives."""

    def way(name: str, implementation: str, backend: str) -> Way:
        return Way(name, build, (shape, dtype, tokens, implementation, backend), bool(backend))

    found = [way(MOEC, "eager", "moec"), way("eager", "eager", ""), way("grouped_mm", "grouped_mm", "")]
    return [*found, way("Inductor, grouped_mm", "grouped_mm", "inductor")] if inductor else found


def _resident(field: str) -> float:
    """VmRSS or VmHWM of this process, in megabytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}")


def _child(pipe: Any, way: Way, tokens: int) -> None:
    built = way.build(*way.args)
    x = built.inputs[tokens]
    for _ in range(2):  # compiles, and fills caches that outlive a step
        built.call(x)
    calls().release()
    gradient_memory().release()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # what the steps before freed is still the process's, and would hide what this one takes
        trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    gradients = built.call(x)
    sizes = sum(g.numel() * g.element_size() for g in gradients) / 1e6
    pipe.send((_resident("VmHWM") - before, sizes))


def peak(way: Way, tokens: int) -> Peak:
    """What one step adds in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(there, way, tokens))
    process.start()
    there.close()
    try:
        extra, sizes = here.recv()
    except EOFError:
        raise RuntimeError(f"the process that measures the memory of {way.name!r} ended early") from None
    finally:
        process.join()
    return Peak(way.name, tokens, extra, sizes)


def peaks(shape: Shape, dtype: str, rows: Sequence[Row], inductor: bool, console: Console, title: str) -> list[Peak]:
    """The memory of every way that was timed, also as a table."""
    tokens = tuple(row.tokens for row in rows)
    known = {way.name: way for way in ways(shape, dtype, tokens, inductor)}
    found = [peak(known[name], row.tokens) for row in rows for name in row.times]
    table = plain_table(f"{title}: what a step adds to resident memory at its peak")
    for name in ("", "tokens", "MB", "of it gradients MB", "beside gradients MB", "× moec"):
        table.add_column(name, justify="right" if name else "left")
    ours = {p.tokens: p.extra_mb for p in found if p.way == MOEC}
    for p in found:
        ratio = f"{p.extra_mb / ours[p.tokens]:.1f}" if ours.get(p.tokens) else "–"
        beside = p.extra_mb - p.gradients_mb
        table.add_row(p.way, str(p.tokens), f"{p.extra_mb:.0f}", f"{p.gradients_mb:.0f}", f"{beside:.0f}", ratio)
    console.print(table)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON and the plot."""
    asked = parse(arguments)
    console, say = Console(), Console(stderr=True, highlight=False)
    console.print(environment_line(), highlight=False)
    raced: list[Raced] = []
    memory: dict[str, list[dict[str, Any]]] = {}
    forms = partial(ways, inductor=asked.inductor)
    with torch.no_grad():
        for each in race_layers(asked, forms, console, say, " training", lambda layer: Training(**asdict(layer))):
            raced.append(each)
            if not asked.no_memory and os.path.exists("/proc/self/clear_refs"):
                found = peaks(each.shape, each.dtype, each.rows, asked.inductor, console, each.title)
                memory[each.title] = [asdict(one) for one in found]
    write_race("train", raced, asked, say, {"memory": memory})


if __name__ == "__main__":
    main()
