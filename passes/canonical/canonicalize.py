"""One spelling for one thing: equal expressions become one value, transposes move into contractions.

%a = reshape(%x); %b = reshape(%x)              →   %a = reshape(%x)
%t = permute(%w) dims=(1, 0); contract(%x, %t)  →   contract(%x, %w) with the letters of %w swapped
%a = slice(%w[e]); contract(%x, %a)             →   slice(contract(%x, %w[e])), see `moec.passes.canonical.slices`
%j = add(%i, 0); take(%w, %j)                   →   take(%w, %i)
masked_fill(%x, ge(%i, E), 0), 0 ≤ i < E        →   %x, see `moec.passes.canonical.ranges`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moec.ir.graph import Arg, Graph, Instr, Ref, substitute, sweep
from moec.passes.canonical import (
    bank_axes,
    gated_sums,
    halves,
    late_views,
    one_hot_index,
    split_axes,
    spread_axes,
    straight_through,
    where_chains,
    written_rows,
)
from moec.passes.canonical.fold_permutes import fold_permutes
from moec.passes.canonical.ranges import Ranges, decided
from moec.passes.canonical.rewriter import Rewritten, Rule, rewritten
from moec.passes.canonical.slices import behind_products
from moec.pipeline import Facts, Outcome

UNIQUE = frozenset(
    {
        "opaque",
        "effect",
        "random",
        "assert",
        "end",
        "changed",
        "changed_view",
        "anchor",
        "anchor_range",
        "carry",
        "carry_int",
        "size",
    }
)
"""Words whose equal-looking instructions are not the same value."""


@dataclass(frozen=True)
class Canonicalize:
    """Value numbering, and contractions read their operands as they are stored."""

    name: str = "canonicalize"

    def run(self, graph: Graph, facts: Facts) -> Outcome:
        """The canonical graph; rewrites counts removed and changed instructions."""
        folded = tuple(fold_permutes(graph))
        plain, sunk, once = _canonical(graph.with_instrs(folded), facts.grad)
        outputs = tuple(once.names.get(name, name) for name in plain.graph.outputs)
        result = sweep(replace(graph, instrs=once.instrs, outputs=outputs))
        changed = sum(a is not b for a, b in zip(folded, graph.instrs, strict=True))
        return Outcome(result, changed + len(sunk) - len(once.instrs))


RULES: tuple[Rule, ...] = (
    split_axes.rule_reshape,
    split_axes.rule_half,
    split_axes.rule_table,
    bank_axes.rule_index,
    bank_axes.rule_gathered,
    one_hot_index.rule_product,
    one_hot_index.rule_place,
    split_axes.rule_joined,
    halves.rule_cut,
    halves.rule_both,
    halves.rule_turned,
    bank_axes.rule_first,
    spread_axes.rule_expand,
    spread_axes.rule_column,
    where_chains.rule_chain,
    gated_sums.rule_apart,
    straight_through.rule_forward,
    written_rows.rule_read,
    written_rows.rule_write,
    late_views.rule_sum,
    late_views.rule_function,
)
"""Canonical forms, in the order in which they are tried on an instruction."""


@dataclass(frozen=True)
class Numbered:
    """Instructions without repetitions, and which name each removed one goes by now."""

    instrs: tuple[Instr, ...]
    names: Mapping[str, str]


def _canonical(folded: Graph, grad: frozenset[str]) -> tuple[Rewritten, tuple[Instr, ...], Numbered]:
    plain = rewritten(folded, RULES, grad, (bank_axes.rule_first,))
    sunk = tuple(behind_products(plain.graph.instrs))
    return plain, sunk, _number(sunk, plain.graph, plain.grad)


def renamed(graph: Graph) -> Mapping[str, str]:
    """Which name each value goes by in the canonical form of a graph, where it is another."""
    plain, _, once = _canonical(graph.with_instrs(tuple(fold_permutes(graph))), frozenset())
    return {**once.names, **{name: once.names.get(kept, kept) for name, kept in plain.names.items()}}


def twins(graph: Graph, grad: frozenset[str]) -> Mapping[str, tuple[str, ...]]:
    """The other values that are the same as a value, in the graph before this pass."""
    found: dict[str, list[str]] = {}
    for name, kept in _number(tuple(fold_permutes(graph)), graph, grad).names.items():
        found.setdefault(kept, []).append(name)
    return {name: tuple(others) for name, others in found.items()}


def _unchanged(instr: Instr, ranges: Ranges, grad: frozenset[str]) -> str | None:
    """The value that an instruction gives back as it is, or None.

    Plus 0 of whole numbers, times 1 of any; what ranges decide; a view of what an update left as it was.
    """
    same = (_neutral(instr, ranges.graph) if instr.word in _NEUTRAL else None) or decided(ranges, instr)
    if instr.word == "changed_view" and instr.args[1] == instr.args[2] and isinstance(instr.args[0], Ref):
        same = instr.args[0].name
    return same if same is not None and (same in grad) == (instr.results[0] in grad) else None


def _neutral(instr: Instr, graph: Graph) -> str | None:
    """x of x + 0, x · 1, also where a tensor is full of it."""
    if len(instr.args) != 2:
        return None
    left, right = (_number_in(graph, arg) for arg in instr.args)
    if instr.word in ("add", "mul") and not isinstance(left, Ref):
        left, right = right, left
    neutral = _NEUTRAL[instr.word]
    if not isinstance(left, Ref) or isinstance(right, Ref | bool) or right != neutral:
        return None
    kind = instr.types[0]
    if kind != graph.types.get(left.name) or (neutral == 0 and kind.dtype not in ("i64", "i32")):
        return None  # −0.0 + 0 is another number
    return left.name


def _number_in(graph: Graph, arg: Arg) -> Arg:
    """The whole number that a tensor is full of."""
    made = graph.defs.get(arg.name) if isinstance(arg, Ref) else None
    if made is None or made.word != "full" or made.types[0].dtype not in ("i64", "i32"):
        return arg
    value = made.attr("value")
    return int(value) if isinstance(value, (int, float)) and value in (0, 1) else arg


_NEUTRAL: Mapping[str, int] = {"add": 0, "sub": 0, "mul": 1, "div": 1}
"""By what number nothing is changed."""


def _number(instrs: tuple[Instr, ...], graph: Graph, grad: frozenset[str]) -> Numbered:
    """Value numbering; a value that carries a gradient is not the same as its copy under no_grad."""
    ranges = Ranges(graph)
    seen: dict[tuple[object, ...], tuple[str, ...]] = {}
    names: dict[str, str] = {}
    kept: list[Instr] = []
    for instr in instrs:
        (instr,) = substitute((instr,), names)
        same = _unchanged(instr, ranges, grad)
        if same is not None:
            names[instr.results[0]] = same
            continue
        # repr keeps 1, 1.0 and True apart, which compare equal.
        differentiable = not grad.isdisjoint(instr.results)
        key = (instr.word, repr(instr.args), repr(instr.attrs), instr.types, differentiable)
        if instr.word not in UNIQUE and key in seen:
            names.update(zip(instr.results, seen[key], strict=True))
            continue
        seen[key] = instr.results
        kept.append(instr)
    return Numbered(tuple(kept), names)
