"""Sites as text, one word of the IR a line; `moec.ir.site_parse` reads it back: `parse_site(dump_site(site)) == site`.

Each line spells the fields that make a word what it is, and the values it uses stand in lines of their own below it.
The other fields follow as `name=value` where they differ from their defaults (a flag that is set is its bare name).
The types after ':' follow from the rest: they may be left out, and a wrong one is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from moec.errors import ParseError
from moec.ir import expr as ex
from moec.ir import site as ir
from moec.ir.field_text import dim_field, tail_text
from moec.ir.graph import Type
from moec.ir.lex import loc_text, quote, value_text, word_text
from moec.ir.site_types import derived_types

MAX_COLUMN = 84
"""Types stand in one column, but a long line does not push them further right than this."""

MAX_LEFT = 16
"""Names left of '=' are padded to one width; a longer one stands out and leaves the others where they are."""

SPELLED = "name x y x_type y_type score select weight dispatch body combine capacity shared states aux guards plan loc"
"""The fields of a site that are not in its header's tail."""


@dataclass(frozen=True)
class Line:
    """One line before alignment: `left = right : types  tail`."""

    right: str
    left: str = ""
    types: tuple[Type, ...] = ()
    tail: str = ""


def dump_site(site: ir.Site) -> str:
    """The site as a block of text."""
    header = (
        f"moe @{_site_name(site.name)} ({value_text(site.x)}: {site.x_type}) -> ({value_text(site.y)}: {site.y_type})"
        f" {tail_text(site, SPELLED)} {{"
    )
    lines = [*_flow(site), *_clauses(site)]
    return "\n".join([header + loc_text(site.loc), *_aligned(lines), "}"]) + "\n"


def _site_name(name: str) -> str:
    return value_text(name)[1:]


def _flow(site: ir.Site) -> Iterator[Line]:
    """The words every site has, in the order of the data."""
    types = derived_types(site)

    def line(left: str, right: str, tail: str) -> Line:
        return Line(right, left, types.get(left.strip(), ()), tail)

    score, select, weight, combine = site.score, site.select, site.weight, site.combine
    x = value_text(site.x)
    yield line("%s", f"score {_score(score, x)}", tail_text(score, "fn weight bias compute dtype", "row_local"))
    yield from _bound(weight=score.weight, bias=score.bias)
    bias = " + bias" if select.bias else ""
    head = f"select {word_text(select.algorithm)}(%s{bias}, k={dim_field(select.k)}, per={word_text(select.budget)})"
    yield line("%e, %p", head, tail_text(select, "algorithm k budget bias"))
    yield from _bound(bias=select.bias)
    tail = tail_text(weight, "source softmax_over_k renormalize dtype")
    yield line("%w", f"weight {_weight(weight)} as {word_text(weight.dtype)}", tail)
    if site.capacity is not None:
        yield Line(f"capacity {tail_text(site.capacity, '', 'order drop')}")
    head = f"dispatch ragged({x}, %e, by={word_text(site.dispatch.granularity)})"
    yield line("%r, %off", head, tail_text(site.dispatch, "granularity"))
    yield from (line(left, right, tail) for left, right, tail in _body(site.body))
    head = f"combine weighted_sum(%h, %w) in {word_text(combine.accumulate)} as {word_text(combine.dtype)}"
    yield line(value_text(site.y), head, tail_text(combine, "accumulate dtype"))


def _bound(**operands: str) -> Iterator[Line]:
    """The values behind the names of a word's operands, a line each below it."""
    yield from (Line(value_text(name), f"  {operand}") for operand, name in operands.items() if name)


def _score(score: ir.Score, x: str) -> str:
    operands = [x, *(["weight"] if score.weight else []), *(["bias"] if score.bias else [])]
    inner = f"linear({', '.join(operands)})" if len(operands) > 1 else x
    return f"{word_text(score.fn)}({inner} in {word_text(score.compute)}) as {word_text(score.dtype)}"


def _weight(weight: ir.Weight) -> str:
    text = f"{word_text(weight.source)}[%e]"
    text = f"softmax({text})" if weight.softmax_over_k else text
    return f"renormalize({text})" if weight.renormalize else text


def _body(body: ir.Body) -> Iterator[tuple[str, str, str]]:
    head = f"body {word_text(body.kind)} {activation_text(body.activation)} of %r in {word_text(body.dtype)}"
    yield "%h", head, tail_text(body, "kind activation dtype params transform", "gate")
    yield from ((f"  {word_text(role)}", names_text(names), "") for role, names in body.params)
    if body.transform != ir.ParamTransform():
        transform = body.transform
        params = ", ".join(map(value_text, transform.params))
        tail = tail_text(transform, "kind params")
        yield "", f"  transform {word_text(transform.kind)}({params})", tail


def _clauses(site: ir.Site) -> Iterator[Line]:
    """The words a site may have besides."""
    if site.shared is not None:
        tail = tail_text(site.shared, "activation")
        yield Line(f"shared {activation_text(site.shared.activation)}", tail=tail)
    for state in site.states:
        yield Line(f"state {value_text(state.name)} {quote(state.update)}", tail=tail_text(state, "name update"))
    for aux in site.aux:
        yield Line(f"aux {word_text(aux.kind)}({value_text(aux.value)})", tail=tail_text(aux, "kind value"))
    for guard in site.guards:
        yield Line(f"guard {quote(guard.predicate)}", tail=tail_text(guard, "predicate"))
    if site.plan != ir.Plan():
        yield Line(f"plan {tail_text(site.plan, '', 'device engine fuse_router')}")


def _aligned(lines: list[Line]) -> Iterator[str]:
    """The lines with '=', ':' and the fields after the types each in one column."""
    width = max(len(line.left) for line in lines if len(line.left) <= MAX_LEFT)
    heads = [f"  {line.left:<{width}} = {line.right}" if line.left else f"  {line.right}" for line in lines]
    types = [", ".join(map(str, line.types)) for line in lines]
    column = max((len(h) for h, t in zip(heads, types, strict=True) if t and len(h) <= MAX_COLUMN), default=0)
    end = max((len(t) for t, line in zip(types, lines, strict=True) if line.tail), default=0)
    for head, kind, line in zip(heads, types, lines, strict=True):
        middle = f"{head:<{column}} : {kind:<{end}}" if kind else head
        yield f"{middle}   {line.tail}".rstrip() if line.tail else middle.rstrip()


def activation_text(activation: str) -> str:
    """An activation as it stands, or quoted where it is not an expression in its own printed form."""
    try:
        plain = str(ex.parse(activation)) == activation and activation.isascii()
    except ParseError:
        plain = False
    return activation if plain else quote(activation)


def names_text(names: tuple[str, ...]) -> str:
    """`%a`, `[%a, %b]`, or `[%experts_0_w .. %experts_7_w]` for a run that differs in one number only."""
    if len(names) == 1:
        return value_text(names[0])
    if len(names) > 2 and run(names[0], names[-1]) == names:
        return f"[{value_text(names[0])} .. {value_text(names[-1])}]"
    return f"[{', '.join(map(value_text, names))}]"


def run(first: str, last: str) -> tuple[str, ...] | None:
    """The names from first to last when they differ in one rising number; None when they do not."""
    a, b = (re.split(r"([0-9]+)", name) for name in (first, last))
    differ = [i for i, (p, q) in enumerate(zip(a, b, strict=False)) if p != q]
    if len(a) != len(b) or len(differ) != 1 or differ[0] % 2 == 0:
        return None
    at = differ[0]
    low, high = int(a[at]), int(b[at])
    if str(low) != a[at] or str(high) != b[at]:
        return None
    return tuple("".join((*a[:at], str(n), *a[at + 1 :])) for n in range(low, high + 1)) or None
