"""Find every region that may be an MoE layer, fused or not: something is chosen, and the choice meets experts.

Nothing is known by name. A choice is an integer or a mask made from numbers; experts are banks (`banks.py`); both
belong together when the choice reaches the bank's rows or matrices, or meets what the bank gives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from moec.ir.graph import Graph, Instr, Type
from moec.passes.reports.banks import Bank, banks_of, root_of
from moec.passes.reports.choices import choices_of, dependence

COMBINES = frozenset({"reduce_sum", "index_add", "index_put", "scatter_add", "scatter", "index_copy", "contract"})
MIXING = COMBINES | {"index", "gather", "grouped"}


_NOTHING = Instr((), "nothing", (), ())


@dataclass(frozen=True)
class Candidate:
    """A region that may be an MoE layer.

    selections  the instructions that choose, in order          banks    what the experts compute with
    combine     where the experts' rows come together, or None  status   fused | open | rejected (see `why`)
    """

    selections: tuple[Instr, ...]
    banks: tuple[Bank, ...]
    combine: Instr | None
    status: str
    why: str = ""
    types: Mapping[str, Type] = field(default_factory=dict[str, Type], repr=False)
    last: Instr = _NOTHING

    @property
    def root(self) -> str:
        """The value that stands for the region."""
        if self.combine is not None:
            return self.combine.results[0]
        return self.banks[-1].instrs[-1] if self.banks else self.selections[-1].results[-1]


@dataclass
class _Links:
    """Which selections and banks belong together: a union of numbers, banks first."""

    parent: list[int]

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        self.parent[self.find(i)] = self.find(j)


@dataclass
class _Reach:
    """For each value the banks that it depends on, as bits; and which bank an instruction belongs to."""

    graph: Graph
    banks: tuple[Bank, ...]
    owner: dict[str, int] = field(default_factory=dict[str, int])
    bits: Mapping[str, int] = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        for number, bank in enumerate(self.banks):
            self.owner.update(dict.fromkeys(bank.instrs, number))
        self.bits = dependence(self.graph, self.owner)

    def of(self, instr: Instr) -> int:
        """The banks that the instruction's operands depend on."""
        mask = 0
        for name in instr.uses:
            mask |= self.bits.get(name, 0)
        return mask

    def numbers(self, mask: int) -> Iterable[int]:
        """The banks in a mask."""
        return (i for i in range(len(self.banks)) if mask >> i & 1)


def candidates_of(graph: Graph, params: Collection[str] = ()) -> tuple[Candidate, ...]:
    """Every region, in order of execution; `params` are the inputs that are known to be parameters."""
    choices = choices_of(graph)
    banks = banks_of(graph, choices, params)
    reach = _Reach(graph, banks)
    chosen = tuple(i for i in choices if not any(r in reach.owner for r in i.results))
    links = _Links(list(range(len(banks) + len(chosen))))
    numbers = {i.results[0]: len(banks) + n for n, i in enumerate(chosen)}
    for instr in chosen:
        _follow_choice(reach, links, instr, numbers)
    for number, bank in enumerate(banks):
        _follow_rows(reach, links, number, bank)
    groups: dict[int, list[int]] = {}
    for number in range(len(banks) + len(chosen)):
        groups.setdefault(links.find(number), []).append(number)
    found = [_candidate(reach, chosen, members) for members in groups.values()]
    return tuple(sorted(found, key=lambda c: graph.position[c.root]))


def _follow_choice(reach: _Reach, links: _Links, start: Instr, numbers: Mapping[str, int]) -> None:
    """Join a choice with the banks it reaches first, or with whose rows it meets."""
    own, past = numbers[start.results[0]], reach.of(start)
    pending, seen = list(start.results), set[str]()
    reached, met = set[int](), set[int]()
    while pending:
        name = pending.pop()
        for user in reach.graph.users.get(name, ()):
            if not user.results or user.results[0] in seen:
                continue
            seen.add(user.results[0])
            owned = {reach.owner[r] for r in user.results if r in reach.owner}
            new = reach.of(user) & ~past
            reached |= owned
            met.update(reach.numbers(new) if not owned else ())
            if owned or new:
                continue
            if user.results[0] in numbers:
                links.join(own, numbers[user.results[0]])
            pending.extend(user.results)
    for number in reached | met:
        # Rows that were chosen and then all treated alike are no experts: only what follows tells those apart.
        if not reach.banks[number].common_rows or number not in reached:
            links.join(own, number)


def _follow_rows(reach: _Reach, links: _Links, number: int, bank: Bank) -> None:
    """Join a bank with the banks that work on its rows before those come together."""
    if bank.fused or bank.kind == "loop":
        return
    pending, seen = list(bank.instrs), set[str]()
    while pending:
        for user in reach.graph.users.get(pending.pop(), ()):
            if not user.results or user.results[0] in seen:
                continue
            seen.add(user.results[0])
            owner = reach.owner.get(user.results[0])
            if owner is not None and owner != number:
                if not reach.banks[owner].fused:
                    links.join(number, owner)
            elif owner is None and user.word not in MIXING and not user.word.startswith("reduce"):
                pending.extend(user.results)


def _candidate(reach: _Reach, chosen: tuple[Instr, ...], members: list[int]) -> Candidate:
    count, graph = len(reach.banks), reach.graph
    banks = tuple(reach.banks[n] for n in members if n < count)
    selections = tuple(chosen[n - count] for n in members if n >= count)
    last = graph.defs[banks[-1].instrs[-1]] if banks else selections[-1]
    made = Candidate(selections, banks, None, "fused", types=graph.types, last=last)
    if not banks:
        left = any(name in graph.outputs for instr in selections for name in instr.results)
        why = "what is chosen meets no parameters that differ by choice"
        why += "; it is returned from this graph" if left else ""
        return replace(made, status="rejected", why=why)
    left = tuple(bank for bank in banks if not bank.fused)
    if not left:
        return made
    made = replace(made, banks=left, combine=_combine(reach, left), last=graph.defs[left[-1].instrs[-1]], status="open")
    dispatched = any(bank.kind in ("grouped", "gathered", "batched") for bank in left)
    if not selections and (len(left) < 2 or not dispatched):
        why = "nothing is chosen: these are parameters with an axis of their own, not experts"
        return replace(made, status="rejected", why=why)
    return made


def _combine(reach: _Reach, banks: tuple[Bank, ...]) -> Instr | None:
    """The first instruction in which the last bank's rows come together."""
    graph, last = reach.graph, banks[-1]
    if last.kind in ("apart", "each"):
        return _joined(graph, last)
    inside = [graph.defs[name] for name in last.instrs if name in graph.defs]
    summed = [i for i in inside if last.kind == "loop" and i.word in COMBINES - {"contract"}]
    if summed:
        return summed[-1]
    pending, seen = list(last.instrs[-1:]), set[str]()
    while pending:
        found: list[Instr] = []
        for name in pending:
            for user in graph.users.get(name, ()):
                if user.results and user.results[0] not in seen:
                    seen.add(user.results[0])
                    found.append(user)
        for user in found:
            if user.results[0] not in reach.owner and _sums(graph, user):
                return user
        pending = [r for user in found for r in user.results]
    return None


def _sums(graph: Graph, instr: Instr) -> bool:
    """Whether rows may come together here; a product with a parameter is a layer of its own."""
    if instr.word == "contract":
        inputs = {name for name, _ in graph.inputs}
        return not any(root_of(graph, arg) in inputs for arg in instr.args)
    return instr.word in COMBINES or instr.word == "reduce_sum"


def _joined(graph: Graph, bank: Bank) -> Instr | None:
    """The first instruction that depends on every product of a bank."""
    bits = dependence(graph, {name: n for n, name in enumerate(bank.instrs)})
    whole = (1 << len(bank.instrs)) - 1
    return next((i for i in graph.instrs if any(bits[name] == whole for name in i.results)), None)
