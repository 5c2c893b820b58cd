"""Find where values meet parameters that differ from expert to expert: what experts compute with, in any spelling.

grouped products · products whose matrices are picked by an index · products with an axis that the parameter leads with
· rolled loops that take or pick their parameters · like-shaped products, each with parameters and rows of its own, or
each met by a choice of its own
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moec.ir.graph import Arg, Graph, Instr, Ref, Type
from moec.passes.raising.word_contract import equation_of
from moec.passes.reports.choices import dependence, is_choice

ANCHORS = frozenset({"anchor", "anchor_range"})
SAME_ITEM = frozenset({"skip", "skip_size", "reshape", "slice", "cast", "same"})
"""Words that give a loop's item back: e[0] of a list of one, say."""
SITES = frozenset({"experts", "moe"})
VIEWS = frozenset({"reshape", "permute", "expand", "slice", "cast", "same", "detach", "repeat"})


@dataclass(frozen=True)
class Bank:
    """Products of rows with parameters that differ from expert to expert.

    kind     fused | grouped | gathered | batched | dense | loop | apart | each
    instrs   the instructions, by their first results; of a loop, those that depend on its item
    experts  how many there are, as text; '' where that is not known
    params   the shapes of one bank's parameters
    """

    kind: str
    instrs: tuple[str, ...]
    experts: str
    params: tuple[str, ...]

    @property
    def fused(self) -> bool:
        """Whether it is an op of moec already."""
        return self.kind == "fused"

    @property
    def common_rows(self) -> bool:
        """Whether every expert reads the same rows, so that only what follows can tell experts from other layers."""
        return self.kind in ("dense", "each")


def banks_of(graph: Graph, choices: Sequence[Instr], params: Collection[str] = ()) -> tuple[Bank, ...]:
    """Every bank of the graph, in order of the first instruction.

    `choices` are what chooses in it, `params` the inputs that are parameters (any input, where nobody knows).
    """
    inputs = set(params) or {name for name, _ in graph.inputs}
    looped = tuple(_loops(graph))
    inside = {name for bank in looped for name in bank.instrs}
    single = tuple(
        bank
        for instr in graph.instrs
        if instr.results and instr.results[0] not in inside
        for bank in (_bank(graph, instr, inputs),)
        if bank is not None
    )
    inside.update(name for bank in single for name in bank.instrs)
    found = (*looped, *single, *_apart(graph, inputs, inside, choices))
    return tuple(sorted(found, key=lambda bank: graph.position[bank.instrs[0]]))


def root_of(graph: Graph, arg: Arg) -> str:
    """The value that `arg` is a view of; '' for a literal."""
    behind = graph.behind(arg, VIEWS)
    return behind.name if isinstance(behind, Ref) else ""


def _bank(graph: Graph, instr: Instr, inputs: set[str]) -> Bank | None:
    """The bank that one instruction is, if it is one."""
    name = instr.results[0]
    if instr.word in SITES:
        return Bank("fused", (name,), str(dict(instr.attrs).get("experts", "")), ())
    if instr.word == "grouped":
        weight = root_of(graph, instr.args[1])
        kind = graph.types[weight]
        return Bank("grouped", (name,), str(kind.shape[0]) if kind.rank == 3 else "", (str(kind),))
    if instr.word == "contract" and len(instr.args) == 2:
        return _contracted(graph, instr, inputs)
    return None


def _contracted(graph: Graph, instr: Instr, inputs: set[str]) -> Bank | None:
    """Two operands: one made of activations, one a parameter with an expert axis, or matrices picked from one."""
    (left, right), out = equation_of(instr)
    for (x, rows), (w, letters) in (
        ((instr.args[0], left), (instr.args[1], right)),
        ((instr.args[1], right), (instr.args[0], left)),
    ):
        root = root_of(graph, w)
        made = graph.defs.get(root)
        picked = made is not None and made.word == "index" and root_of(graph, made.args[0]) in inputs
        if made is not None and picked:
            table = graph.types[root_of(graph, made.args[0])]
            if table.rank >= 3 and _integers(graph, made.args[1:]):
                return Bank("gathered", instr.results[:1], str(table.shape[0]), (str(table),))
        if root not in inputs or root_of(graph, x) == root or graph.types[root].rank < 3:
            continue
        shared = [c for c in letters if c in rows and c in out]
        alone = [c for c in letters if c not in rows and c in out]
        if shared and len(letters) >= 3:
            return Bank("batched", instr.results[:1], _size(graph, w, letters, shared[0]), (str(graph.types[root]),))
        if len(alone) >= 2 and len(letters) >= 3 and letters[0] in alone:
            return Bank("dense", instr.results[:1], _size(graph, w, letters, letters[0]), (str(graph.types[root]),))
    return None


def _integers(graph: Graph, args: tuple[Arg, ...]) -> bool:
    return all(isinstance(a, Ref) and graph.types[a.name].dtype.startswith(("i", "u")) for a in args)


def _size(graph: Graph, arg: Arg, letters: str, letter: str) -> str:
    kind = graph.types[arg.name] if isinstance(arg, Ref) else Type("any")
    return str(kind.shape[letters.index(letter)])


def _loops(graph: Graph) -> Iterator[Bank]:
    """Rolled loops whose item takes or picks parameters."""
    for anchor in (i for i in graph.instrs if i.word in ANCHORS):
        members = _dependent(graph, anchor)
        items = {anchor.results[0]}
        for instr in members:
            if instr.word in SAME_ITEM and instr.uses[0] in items:
                items.update(instr.results)
        chosen = [i for i in members if i.word in ("take", "pick") and not items.isdisjoint(i.uses)]
        tables = [i for i in chosen if i.types[0].rank >= 1 and not is_choice(i.types[0].dtype)]
        if not tables:
            continue
        experts = {_count(graph, i) for i in tables}
        params = tuple(dict.fromkeys(str(i.types[0]) for i in tables))
        names = (anchor.results[0], *(r for i in members for r in i.results))
        yield Bank("loop", names, experts.pop() if len(experts) == 1 else "", params)


def _count(graph: Graph, instr: Instr) -> str:
    """How many tables a `pick` or `take` picks from."""
    tables = instr.args[0]
    if isinstance(tables, tuple):
        return str(len(tables))
    return str(graph.types[tables.name].shape[0]) if isinstance(tables, Ref) else ""


def _dependent(graph: Graph, anchor: Instr) -> list[Instr]:
    """The instructions between an anchor and its end that depend on the item."""
    held = set(anchor.results)
    found: list[Instr] = []
    for instr in graph.instrs[graph.position[anchor.results[0]] + 1 :]:
        if instr.word == "end" and anchor.results[0] in instr.uses:
            break
        if not held.isdisjoint(instr.uses):
            held.update(instr.results)
            found.append(instr)
    return found


def _apart(graph: Graph, inputs: set[str], inside: set[str], choices: Sequence[Instr]) -> Iterator[Bank]:
    """Like products with parameters of like shapes: a loop over experts that was traced as it was written."""
    groups: dict[tuple[str, ...], list[tuple[Instr, frozenset[str]]]] = {}
    for instr in graph.instrs:
        if instr.word not in ("contract", "opaque") or not instr.results or instr.results[0] in inside:
            continue
        roots = {name: root_of(graph, Ref(name)) for name in instr.uses}
        params = [root for root in roots.values() if root in inputs and graph.types[root].rank]
        rows = frozenset(name for name, root in roots.items() if root not in params)
        if params and rows:
            what = str(dict(instr.attrs).get("eq") or dict(instr.attrs).get("target"))
            key = (instr.word, what, *(str(graph.types[n]) for n in params))
            groups.setdefault(key, []).append((instr, rows))
    met = dependence(graph, {name: n for n, instr in enumerate(choices) for name in instr.results})
    for key, members in groups.items():
        if len(members) < 2:
            continue
        shapes = tuple(dict.fromkeys(key[2:]))
        for rows, own in _by_source(graph, members):
            kind = "apart" if rows > 1 else "each"
            if kind == "apart" or _met_apart(graph, own, met):
                yield Bank(kind, tuple(instr.results[0] for instr in own), str(len(own)), shapes)


def _by_source(
    graph: Graph, members: Sequence[tuple[Instr, frozenset[str]]]
) -> Iterator[tuple[int, tuple[Instr, ...]]]:
    """(how many different rows, products): those whose rows come, by an index or a mask, from one value, or are it."""
    sources: dict[str, list[tuple[Instr, frozenset[str]]]] = {}
    for instr, rows in members:
        name = sorted(rows)[0]
        made = graph.defs.get(root_of(graph, Ref(name)))
        picked = made is not None and made.word in ("index", "gather", "mul", "where", "chunk", "split")
        source = root_of(graph, made.args[0]) if made is not None and picked else root_of(graph, Ref(name))
        sources.setdefault(f"{source} {picked}", []).append((instr, rows))
    for found in sources.values():
        if len(found) > 1:
            yield len({rows for _, rows in found}), tuple(instr for instr, _ in found)


def _met_apart(graph: Graph, members: Sequence[Instr], chosen: Mapping[str, int]) -> bool:
    """Whether a choice meets what each product gives before two of the products meet (q·k and gate·up do not wait)."""
    past = 0
    for name in members[0].uses:
        past |= chosen.get(name, 0)
    held = {instr.results[0]: 1 << n for n, instr in enumerate(members)}
    met = 0
    for instr in graph.instrs[graph.position[members[0].results[0]] + 1 :]:
        mask = 0
        for name in instr.uses:
            mask |= held.get(name, 0)
        if not mask or any(name in held for name in instr.results):
            continue
        if any(chosen.get(name, 0) & ~past for name in instr.results):
            met |= mask
            continue
        if mask & (mask - 1) and instr.word not in ("cat", "stack"):
            return False
        held.update(dict.fromkeys(instr.results, mask))
    return met == (1 << len(members)) - 1
