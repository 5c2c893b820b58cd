"""Sums of the same experts over the same tokens are one sum over the slots of all: a loop over slots is a dispatch.

%y0 = experts(%x, %w0, %e0, (…)); %y1 = experts(%x, %w1, %e1, (…)); %y = add(%y0, %y1)
    →   %y = experts(%x, cat(%w0, %w1), cat(%e0, %e1), (…))

Columns of one [T, k] tensor that come together whole are that tensor, so that its router is still found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy

from moec.ir.graph import Graph, Instr, Ref, sweep
from moec.passes.rows.pairs import Writer, joined
from moec.passes.rows.sums import part_of_sum
from moec.passes.rows.token_axes import column_of, seen, shaped_like
from moec.pipeline import Facts, Outcome


@dataclass(frozen=True)
class JoinSlots:
    """Join `experts` that are added up, where they differ in their choices and weights alone."""

    name: str = "join-slots"

    def run(self, graph: Graph, facts: Facts) -> Outcome:
        """The graph with one site where there were several; it costs no fuel, since each of them was paid for."""
        made: dict[str, tuple[Instr, ...]] = {}
        done = 0
        for instr in graph.instrs:
            if instr.word != "add" or part_of_sum(graph, instr):
                continue
            leaves = list(_leaves(graph, instr))
            groups = _alike(graph, leaves)
            if groups:
                made[instr.results[0]] = _joined(graph, instr, leaves, groups)
                done += len(groups)
        instrs = [new for old in graph.instrs for new in made.get(old.results[0] if old.results else "", (old,))]
        return Outcome(sweep(graph.with_instrs(instrs)), done)


def _leaves(graph: Graph, root: Instr) -> Iterator[str]:
    """What a chain of additions adds, in order."""
    pending = list(reversed(root.args))
    while pending:
        arg = pending.pop()
        made = graph.defs.get(arg.name) if isinstance(arg, Ref) else None
        if made is not None and made.types == root.types and part_of_sum(graph, made):
            pending += reversed(made.args)
        else:
            yield arg.name if isinstance(arg, Ref) else ""


def _alike(graph: Graph, leaves: Sequence[str]) -> list[list[Instr]]:
    """The sites among the leaves that differ in weights and choices alone, two or more together."""
    if not all(leaves):
        return []
    groups: dict[tuple[object, ...], list[Instr]] = {}
    for name in leaves:
        site = _site(graph, name)
        if site is None:
            continue
        rows, weights, choice = (ref.name for ref in site.args[:3] if isinstance(ref, Ref))
        attrs = tuple(item for item in site.attrs if item[0] != "form")
        if "capacity" not in dict(attrs):
            kinds = (graph.types[weights].dtype, graph.types[choice].dtype)
            groups.setdefault((seen(graph, rows), graph.types[rows], site.args[3], attrs, kinds), []).append(site)
    return [sites for sites in groups.values() if len(sites) > 1]


def _site(graph: Graph, name: str) -> Instr | None:
    """The experts whose result, on whatever axes of tokens, a leaf is and nothing else reads."""
    made = graph.defs.get(name)
    while made is not None and len(graph.users.get(name, ())) == 1 and name not in graph.outputs:
        if made.word == "experts":
            return made
        if made.word != "reshape":
            return None
        name = made.uses[0]
        made = graph.defs.get(name)
    return None


def _joined(graph: Graph, root: Instr, leaves: Sequence[str], groups: Sequence[Sequence[Instr]]) -> tuple[Instr, ...]:
    """The instructions that make `root`: a site for each group, added to what is left."""
    out = Writer(graph, root)
    gone = {site.results[0] for sites in groups for site in sites}
    places = {name: site.results[0] for name in leaves if (site := _site(graph, name)) is not None}
    rest = [name for name in leaves if places.get(name) not in gone]
    for sites in groups:
        weights, choices = ([_of(site, at) for site in sites] for at in (1, 2))
        w, e = _whole(graph, weights), _whole(graph, choices)
        same = w is not None and e is not None and w[1] == e[1]
        names = (joined(out, weights), joined(out, choices))
        if w and e and same:
            names = (_pairs(out, w[0]), _pairs(out, e[0]))
        first = sites[0]
        args = (first.args[0], *map(Ref, names), first.args[3])
        name = f"{root.results[0]}.slots{len(rest)}"
        rows = name if first.types == root.types else f"{name}.rows"
        out.instrs.append(Instr((rows,), "experts", args, first.types, first.attrs, first.loc or root.loc))
        if rows != name:
            shaped = shaped_like(graph, seen(graph, first.uses[0]), root.types[0].shape)
            like = [Ref(shaped)] if shaped else []
            out.instrs.append(Instr((name,), "reshape", (Ref(rows), *like), root.types, (), root.loc))
        rest.append(name)
    return (*out.instrs, *_added(root, rest)) if len(rest) > 1 else _renamed(out.instrs, root)


def _of(site: Instr, at: int) -> str:
    ref = site.args[at]
    assert isinstance(ref, Ref)
    return ref.name


def _renamed(instrs: Sequence[Instr], root: Instr) -> tuple[Instr, ...]:
    """The last instruction makes the root itself."""
    *before, last = instrs
    return (*before, Instr(root.results, last.word, last.args, last.types, last.attrs, last.loc))


def _added(root: Instr, names: Sequence[str]) -> Iterator[Instr]:
    """The names added up to the root."""
    total = names[0]
    for i, name in enumerate(names[1:], start=2):
        result = root.results[0] if i == len(names) else f"{root.results[0]}.sum{i}"
        yield Instr((result,), "add", (Ref(total), Ref(name)), root.types, (), root.loc)
        total = result


def _pairs(out: Writer, source: str) -> str:
    """A […, k] tensor as [T, k]."""
    shape = out.type(source).shape
    return out.reshape(source, (sympy.Mul(*shape[:-1]), shape[-1]))


def _whole(graph: Graph, names: Sequence[str]) -> tuple[str, tuple[int, ...]] | None:
    """The […, k] tensor that [T, 1] tensors are all the columns of, and which column each is."""
    found = [column_of(graph, name) for name in names]
    columns = tuple(column[1] for column in found if column is not None)
    sources = {column[0] for column in found if column is not None}
    if len(columns) != len(names) or len(sources) != 1:
        return None
    source = sources.pop()
    return (source, columns) if graph.types[source].shape[-1] == len(names) == len(set(columns)) else None
