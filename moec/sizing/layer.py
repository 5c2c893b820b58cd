"""What `moec inspect --capacity` knows of a fused layer: bounds in terms of T, capacities from loads, LocMoE's bound.

Letters: T tokens, H hidden, F expert width, E experts, k experts a token, C capacity; a pair is one (token, slot).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from moec.codegen.backward_plan import backward_formula, saved_bytes
from moec.codegen.plan import Rows, workspace_formula
from moec.codegen.storage import panel_spec, storage_of
from moec.codegen.triton_launch import buffer_formula
from moec.codegen.tuning import Sizes
from moec.errors import TargetError
from moec.ir import site as ir
from moec.ir.bounds import TOKENS, Choices, Size, shown
from moec.ir.site_parse import parse_site
from moec.ir.spec import KernelSpec
from moec.ir.token_range import TokenRange
from moec.options import Options
from moec.report import Report, Site
from moec.runtime.reserve import at_most
from moec.sizing.angles import Angles, least_capacity, least_capacity_simple
from moec.sizing.drops import Sized, size_for
from moec.sizing.loads import Load
from moec.target import Target

RANGE = "1..4096"
"""Numbers of tokens that figures are shown for where nothing says how many there are."""

GPU_ROWS = 128
"""Rows of the largest tile that a GPU kernel takes; an expert's last tile may be partly empty."""


@dataclass(frozen=True)
class Bound:
    """An upper bound: its name, unit, formula, and its values for the fewest and most tokens (None: not in T alone)."""

    name: str
    unit: str
    formula: str
    values: tuple[int | None, int | None]


@dataclass(frozen=True)
class Local:
    """LocMoE's lower bound on the rows of an expert, in both its forms, and what it was worked out from."""

    delta: float
    exact: float
    simple: float
    angles: Angles


@dataclass(frozen=True)
class Sizing:
    """One layer. `drops` says whether pairs can be dropped and why; `sized`, `local` need recorded loads."""

    layer: str
    tokens: tuple[int, int]
    capacity: str
    drops: str
    bounds: tuple[Bound, ...]
    sized: Sized | None = None
    local: Local | None = None
    note: str = ""


def parse_tokens(text: str) -> TokenRange:
    """`1..4096`, or one number; raises TargetError."""
    try:
        return TokenRange.parse(text)
    except ValueError as error:
        raise TargetError(f"--tokens {error}") from None


def sizings(
    report: Report, tokens: TokenRange | None, options: Options, loads: Sequence[Load], rate: float
) -> tuple[Sizing, ...]:
    """One sizing for each fused layer whose parts are known, in execution order.

    Without `tokens`, numbers are for the range that a layer's buffers are taken for, else for `RANGE`.

    Raises TargetError where loads are given and none is of a layer of the model.
    """
    by_name = {load.site: load for load in loads}
    names = [site.name for site in report.sites]
    if loads and not by_name.keys() & set(names):
        raise TargetError(f"the loads are of {', '.join(by_name)}; the model's layers are {', '.join(names) or 'none'}")
    made: list[Sizing] = []
    for site in report.sites:
        if site.status == "fused":
            shown_for = tokens or TokenRange.parse(site.tokens or RANGE)
            ends = (shown_for.low, shown_for.high)
            sizing = _sizing(site, ends, options) if site.ir else _unknown(site, ends)
            load = by_name.get(site.name)
            made.append(_with_load(sizing, load, rate) if load else sizing)
    return tuple(made)


def _unknown(site: Site, tokens: tuple[int, int]) -> Sizing:
    """A layer whose experts run code of their own: rows only."""
    choices = Choices(TOKENS, site.num_experts, site.top_k)
    note = "its experts run their own code, whose memory is PyTorch's"
    return Sizing(site.name, tokens, site.capacity, "never: every choice is served", _rows(choices, tokens), note=note)


def _sizing(site: Site, tokens: tuple[int, int], options: Options) -> Sizing:
    parsed = parse_site(site.ir)
    choices = _choices(parsed)
    seats = "" if choices.limit is None else f"{shown(choices.limit)} rows an expert"
    queues = f" in each of {shown(choices.queues)} groups of tokens" if choices.queues != 1 else ""
    capacity = f"{seats}{queues}" or site.capacity
    spec = KernelSpec.parse(site.spec)
    sizes = _sizes(parsed, tokens[1])
    bounds = list(_rows(choices, tokens))
    if sizes is None:
        return Sizing(site.name, tokens, capacity, _drops(choices), tuple(bounds), note="a size is no number")
    bounds += [
        _bound(name, "bytes", formula, tokens) for name, formula in _bytes(site, parsed, spec, sizes, options, choices)
    ]
    if site.tokens:
        most = replace(sizes, T=TokenRange.parse(site.tokens).high)
        queues = replace(choices, distinct=False)  # of choices the runtime knows no more than their capacity
        bounds += _reserved(site.tokens, _bytes(site, parsed, spec, most, options, queues), most.T)
    note = "T counts the rows that experts take" if parsed.form == "expert_choice" else ""
    return Sizing(site.name, tokens, capacity, _drops(choices), tuple(bounds), note=note)


def _choices(site: ir.Site) -> Choices:
    """The layer's choices with T as the number of tokens, where one symbol of its own says how many there are."""
    rows = sympy.Mul(*site.x_type.shape[:-1])
    capacity = site.capacity
    limit = capacity.limit if capacity else None
    symbols = sorted(rows.free_symbols, key=str)
    queues: Size = capacity.queues if capacity else 1
    if limit is not None and (rows / limit).is_number:  # experts that choose: each takes its share of the rows
        limit = TOKENS * limit / rows
    elif limit is not None and len(symbols) == 1 and (rows / symbols[0]).is_number:
        own = TOKENS * symbols[0] / rows
        limit, queues = (sympy.sympify(size).subs(symbols[0], own) for size in (limit, queues))
    served = capacity is not None and capacity.drop == "never"
    distinct = site.select.algorithm == "topk"
    return Choices(TOKENS, int(site.num_experts), int(site.select.k), distinct, limit, queues, served)


def _sizes(site: ir.Site, tokens: int) -> Sizes | None:
    dims = (site.x_type.shape[-1], site.body.width, site.num_experts, site.select.k, site.y_type.shape[-1])
    return Sizes(tokens, *map(int, dims)) if all(dim.is_Integer for dim in dims) else None


def _drops(choices: Choices) -> str:
    if choices.limit is None:
        return "never: every choice is served"
    if choices.served and choices.limit * choices.E == choices.pairs:
        return "experts choose: each takes as many rows as it may, what nobody takes is left out"
    if choices.never_drops:
        return "never, proved: no choice of experts makes a longer queue; the graph holds no drop logic"
    return f"possible: one expert may be chosen by {shown(choices.wanted)} pairs"


def _rows(choices: Choices, tokens: tuple[int, int]) -> tuple[Bound, ...]:
    named = {
        "chosen pairs": choices.pairs,
        "rows of one expert": choices.rows,
        "pairs computed": choices.kept,
        "pairs dropped by capacity": choices.dropped,
    }
    found = tuple(_bound(name, "rows", size, tokens) for name, size in named.items())
    padded, tile = choices.padded(GPU_ROWS), GPU_ROWS
    short = shown(choices.kept + choices.E * (tile - 1))
    return (*found, replace(_bound("", "rows", padded, tokens), name=f"rows in tiles of {tile} (GPU)", formula=short))


def _bytes(
    site: Site, parsed: ir.Site, spec: KernelSpec, sizes: Sizes, options: Options, choices: Choices
) -> Iterator[tuple[str, Size]]:
    """What the kernels that were chosen ask for besides inputs, outputs and parameters."""
    kernel = site.kernels[0] if site.kernels else ""
    if kernel.endswith("_eager"):
        return
    if kernel.endswith("_triton"):
        limit = None if choices.limit is None or not _in_tokens(choices.seats) else choices.seats
        yield "buffers, forward (Triton)", buffer_formula(spec, sizes, parsed.plan.fuse_router, capacity=limit)
        return
    target, threads, training = Target.host(), torch.get_num_threads(), parsed.plan.training
    x = Rows(parsed.x_type.dtype, sizes.H, False)  # of any strides: what lies otherwise is copied
    weights = options.engine(training=training).weights
    storage = None if weights == "stored" else storage_of(weights, spec.experts, target)
    read = panel_spec(spec) if storage else spec
    yield "workspace, forward (C++)", workspace_formula(read, sizes, x, target, threads, storage)
    if training:
        kept = saved_bytes(spec, sizes.H, sizes.F, sizes.O, sizes.k, options.save_activations)
        yield "kept for backward (C++)", kept * TOKENS
        rows = choices.rows
        yield "workspace, backward (C++)", backward_formula(spec, sizes, x, x, rows, target, threads)


def _reserved(tokens: str, asked: Iterable[tuple[str, Size]], most: int) -> Iterator[Bound]:
    """What is taken once for the declared range: a thread has one workspace, a call of Triton kernels one block."""
    sizes = {name: at_most(size, most) for name, size in asked if name.startswith(("workspace", "buffers"))}
    if sizes:
        who = "a call (Triton)" if any("Triton" in name for name in sizes) else "a thread (C++)"
        taken = max(sizes.values())
        yield Bound(f"reserved, {who}", "bytes", f"for {tokens} tokens", (taken, taken))


def _in_tokens(size: Size) -> bool:
    return sympy.sympify(size).free_symbols <= {TOKENS}


def _bound(name: str, unit: str, size: Size, tokens: tuple[int, int]) -> Bound:
    found = sympy.sympify(size)
    low, high = (_value(found.subs(TOKENS, t)) for t in tokens)
    return Bound(name, unit, shown(found), (low, high))


def _value(size: sympy.Expr) -> int | None:
    return int(sympy.ceiling(size)) if size.is_number else None


def _with_load(sizing: Sizing, load: Load, rate: float) -> Sizing:
    local = None
    if load.angles is not None:
        delta = load.angles.delta(rate)
        at = (load.experts, load.angles.channels, delta)
        local = Local(delta, least_capacity(*at), least_capacity_simple(*at), load.angles)
    return replace(sizing, sized=size_for(load, rate), local=local)
