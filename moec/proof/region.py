"""A rewrite as two runnable graphs over the same leaves: the user's own nodes, and what moec puts in their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import cast

from torch import fx

from moec.capture.region import regions
from moec.ir.formulas import size_of
from moec.ir.graph import Graph, Instr, Ref
from moec.passes.canonical.canonicalize import twins
from moec.passes.capacity.products import nonnegative_value
from moec.passes.lowering.lower import Lowering, any_views, emit, groups_of, root_node
from moec.passes.raising.raise_graph import Raised
from moec.passes.rows.token_axes import choice_axes
from moec.proof.copying import Copy, Leaf, Size, Source, Unprovable


@dataclass(frozen=True)
class Half:
    """One of the two graphs; `feeds` says which leaf each placeholder stands for."""

    graph: fx.Graph
    feeds: Mapping[str, str]


@dataclass(frozen=True)
class Pair:
    """One rewrite: two graphs that must return the same values, named by `outputs`.

    distinct  whether a token's choices are known to be different experts
    needs     the values that need a gradient
    """

    root: str
    original: Half
    replacement: Half
    leaves: tuple[Leaf, ...]
    outputs: tuple[str, ...]
    site: Instr
    distinct: bool
    needs: frozenset[str]


@dataclass
class Carver:
    """Makes the pair of each rewrite of one graph; what they share is worked out once."""

    gm: fx.GraphModule
    raised: Raised
    graph: Graph
    grad: frozenset[str]
    source: Source = field(init=False)
    groups: dict[str, list[Instr]] = field(init=False)
    old_names: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.source = source_of(self.gm, self.raised, self.grad)
        self.groups = groups_of(self.raised, self.graph)
        self.old_names = {
            new: old
            for instr in self.graph.instrs
            if instr.word == "moe"
            for new, old in zip(instr.results[1:], replaced_by(instr), strict=True)
        }

    def pair(self, root: str) -> Pair:
        """The rewrite that replaces the value `root`; raises Unprovable."""
        instrs = self.groups[root]
        site = next((i for i in instrs if "spec" in dict(i.attrs)), None)
        if site is None:
            raise Unprovable("the rewrite has no instruction with a spec")
        roles = _roles(site, instrs)
        choices = self._choices(roles, root)
        roles |= {name: "choice" for name in roles if self.old(name) in choices}
        later = self._computed_from(choices, root)
        # Gates are zero where the mask that they come from is, and that may compare scores with the k-th of them.
        masks = tuple(n for n in map(self.old, _masked(instrs)) if roles.get(n) == "given")
        later |= self._computed_from((*masks, *self._first_of(masks, root)), root)
        derived = [n for n in map(self.old, roles) if (n in later or self._constant(n)) and n not in choices]
        cut = self._cut(roles, derived)
        original, replacement = Copy(self.source, cut), Copy(self.source, cut)
        for name in derived:  # computed from the choice, so both graphs compute it: as a leaf it would not fit
            replacement.value(name, within=later)
        original.cut.update(replacement.cut)
        replaced = replaced_by(site)
        outputs = (root, *replaced)
        original.graph.output(tuple(original.value(name) for name in outputs))
        self._emit(replacement, instrs, (root, *(site.results[1:] if replaced else ())))
        leaves = {leaf.name: leaf for half in (replacement, original) for leaf in half.leaves.values()}
        return Pair(
            root,
            Half(original.graph, original.feeds),
            Half(replacement.graph, replacement.feeds),
            tuple(signed(self.raised.graph, leaf) for leaf in leaves.values()),
            outputs,
            site,
            all(is_distinct(self.raised.graph, choice) for choice in choices),
            self.grad,
        )

    def old(self, name: str) -> str:
        """The user's own name of a value that a fused router returns."""
        return self.old_names.get(name, name)

    def _cut(self, roles: Mapping[str, str], derived: Iterable[str]) -> dict[str, Leaf]:
        """The values, and those that are equal to them, at which the two graphs begin."""
        found: dict[str, Leaf] = {}
        for name, role in roles.items():
            old = self.old(name)
            if old not in derived:
                holders = self.raised.carriers.get(old, ())
                leaf = Leaf(old, role, self.raised.graph.types[old], holders[0][0] if holders else None)
                found.update(dict.fromkeys((old, *self.source.lowering.twins.get(old, ())), leaf))
        return found

    def _choices(self, roles: Mapping[str, str], root: str) -> tuple[str, ...]:
        """The site's choice; where new instructions make it, the whole numbers they read, each on its own."""
        given = tuple(self.old(name) for name, role in roles.items() if role == "choice")
        if given:
            return given
        types = self.raised.graph.types
        whole = [n for n in map(self.old, roles) if types[n].dtype in ("i64", "i32") and types[n].rank]
        numbers = [n for n in whole if not self._constant(n)]
        return tuple(n for n in numbers if not any(n in self._computed_from((o,), root) for o in numbers if o != n))

    def _first_of(self, masks: tuple[str, ...], root: str) -> tuple[str, ...]:
        """Of the values that a mask compares, those that another one is computed from."""
        defs = self.raised.graph.defs
        compared = {name for mask in masks if mask in defs for name in defs[mask].uses}
        return tuple(
            n for n in sorted(compared) if not (compared - {n}).isdisjoint(self._computed_from((n,), root) - {n})
        )

    def _constant(self, name: str) -> bool:
        """Whether a value is the same for any input of its size."""
        made = self.raised.graph.defs.get(name)
        return made is not None and made.word in ("arange", "full")

    def _computed_from(self, choices: tuple[str, ...], last: str) -> frozenset[str]:
        """The values up to `last` that are computed from the choices, with these."""
        same = tuple(s for choice in choices for s in (choice, *self.source.lowering.twins.get(choice, ())))
        return computed_from(self.raised.graph, same, last)

    def _emit(self, copy: Copy, instrs: list[Instr], outputs: tuple[str, ...]) -> None:
        """The new instructions as nodes of `copy`, by the same code that lowers them into the user's graph."""
        made = {name for instr in instrs for name in instr.results}
        reads = dict.fromkeys(name for instr in instrs for name in instr.uses if name not in made)
        operands = {name: copy.operand(self.old(name)) for name in reads}
        holder = cast(fx.GraphModule, SimpleNamespace(graph=copy.graph))
        sketch = Sketch(holder, self.raised, "eager", frozenset(), {}, operands=operands)
        origin = root_node(self.source.lowering, instrs[-1].results[0])
        emit(sketch, instrs, next(iter(reversed(copy.graph.nodes))), origin)
        copy.graph.output(tuple(sketch.made[name] for name in outputs))


@dataclass
class Sketch(Lowering):
    """Lowering into a graph of its own, which nothing else reads."""

    operands: Mapping[str, fx.Node] = field(default_factory=dict[str, fx.Node])

    def node(self, name: str, at: int) -> fx.Node:
        """The node of the sketch that holds `name`."""
        return self.made[name] if name in self.made else self.operands[name]

    def size(self, given: object, at: int) -> object:
        """A size that a trial chooses."""
        return given if isinstance(given, int) else Size(size_of(given))

    def users(self, name: str, after: int) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Nothing."""
        return iter(())


def source_of(gm: fx.GraphModule, raised: Raised, grad: frozenset[str]) -> Source:
    """The user's graph, as what is copied from."""
    lowering = Lowering(gm, raised, "eager", any_views(raised.graph), twins(raised.graph, grad))
    return Source(lowering, {node.name: node for node in gm.graph.nodes}, regions(gm))


def signed(graph: Graph, leaf: Leaf) -> Leaf:
    """A leaf that never is negative in the user's graph is not negative in a trial either."""
    if leaf.role in ("given", "sparse") and nonnegative_value(graph, leaf.name):
        return replace(leaf, role="weight" if leaf.role == "given" else "sparse weight")
    return leaf


def computed_from(graph: Graph, values: tuple[str, ...], last: str) -> frozenset[str]:
    """The values up to `last` that are computed from these, with these."""
    if not values:
        return frozenset()
    found = set(values)
    first = min(graph.position[name] for name in found)
    for instr in graph.instrs[first + 1 : graph.position[last]]:
        if not found.isdisjoint(instr.uses):
            found.update(instr.results)
    return frozenset(found)


def is_distinct(graph: Graph, choice: str) -> bool:
    """Whether the choice comes from a top-k or a sort along experts, or is one expert a token."""
    if not choice or "s" not in choice_axes(graph, choice) or graph.types[choice].shape[-1] == 1:
        return True
    first = graph.behind(Ref(choice), ("cast", "same", "slice", "detach"))
    made = graph.defs.get(first.name) if isinstance(first, Ref) else None
    return made is not None and made.word in ("topk", "sort") and first == Ref(made.results[1])


def replaced_by(site: Instr) -> tuple[str, ...]:
    """The router's values that a fused site returns too."""
    value = dict(site.attrs).get("replaces")
    return tuple(map(str, value)) if isinstance(value, tuple) else ()


def _masked(instrs: list[Instr]) -> set[str]:
    """What new instructions read to make a choice of a mask."""
    wanted = {name for instr in instrs if instr.word == "experts_where" for name in instr.uses}
    for instr in reversed(instrs):
        if not wanted.isdisjoint(instr.results):
            wanted = (wanted - set(instr.results)) | set(instr.uses)
    return wanted


def _roles(site: Instr, instrs: list[Instr]) -> dict[str, str]:
    """The values that the new instructions read and do not make, with what the site takes them for."""
    made = {name for instr in instrs for name in instr.results}
    roles: dict[str, str] = {}
    order = ("token", "router", "param") if site.word == "moe" else ("token", "weight", "choice", "param")
    for role, arg in zip(order, site.args, strict=False):
        for ref in arg if isinstance(arg, tuple) else (arg,):
            if isinstance(ref, Ref) and ref.name not in made:
                roles.setdefault(ref.name, role)
    for name in (name for instr in instrs for name in instr.uses if name not in made):
        roles.setdefault(name, "given")
    return roles | {name: "sparse" for name in _asked_for_zero(instrs) if roles.get(name) == "given"}


def _asked_for_zero(instrs: list[Instr]) -> Iterator[str]:
    """The numbers of which new instructions ask whether they are 0: pairs are left out where they are."""
    for instr in instrs:
        if instr.word in ("ne", "gt") and isinstance(instr.args[0], Ref) and instr.args[1:] == (0,):
            yield instr.args[0].name
