"""Put what the passes found back into torch's FX graph: one custom op a site, the code it replaces removed."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moec.errors import VerifyError
from moec.ir.dims import dim_text
from moec.ir.engine import Engine
from moec.ir.formulas import over_tokens
from moec.ir.graph import Arg, Graph, Instr, Ref, sweep
from moec.ir.token_range import TokenRange
from moec.passes.canonical.canonicalize import renamed, twins
from moec.passes.lowering.layout import laid_out
from moec.passes.lowering.lower_words import WORDS
from moec.passes.raising.raise_graph import Raised, dim_of, fake

SITES = frozenset({"experts", "moe"})


@dataclass
class Lowering:
    """The state of one lowering.

    viewed  values written into a storage that is seen under several shapes
    made    values that have a new FX node
    twins   values computed a second time, by the name of the first: a node may hold only one of them by now
    grad    values with a gradient: experts that read one keep for its backward pass what the option `save` says
    """

    gm: fx.GraphModule
    raised: Raised
    engine: str
    viewed: frozenset[str]
    twins: Mapping[str, tuple[str, ...]]
    grad: frozenset[str] = frozenset()
    save: str = "auto"
    made: dict[str, fx.Node] = field(default_factory=dict)
    _histories: dict[fx.Node, list[tuple[str, int]]] = field(default_factory=dict)

    def node(self, name: str, at: int) -> fx.Node:
        """An FX node that holds the value `name` at position `at`."""
        if name in self.made:
            return self.made[name]
        for same in (name, *self.twins.get(name, ())):
            for node, since in self.raised.carriers.get(same, ()):
                if since <= at and self.holds(node, at) == same:
                    return node
        raise KeyError(f"no node holds %{name} at position {at}")

    def holds(self, node: fx.Node, at: int) -> str:
        """The value that `node` stands for at position `at`."""
        held, best = "", -1
        for name, since in self.histories[node]:
            if best <= since <= at:
                held, best = name, since
        return held

    @property
    def histories(self) -> dict[fx.Node, list[tuple[str, int]]]:
        """What each node held, and from when."""
        if not self._histories:
            for name, carriers in self.raised.carriers.items():
                for node, since in carriers:
                    self._histories.setdefault(node, []).append((name, since))
        return self._histories

    @cached_property
    def sizes(self) -> ShapeEnv | None:
        """What torch knows of the graph's symbolic sizes."""
        return shape_env(self.raised)

    def size(self, given: object, at: int) -> object:
        """A size at position `at`: the number that it is, or a node that holds the size of this text."""
        if isinstance(given, int):
            return given
        for node, since in self.raised.order.items():
            value = fake(node)
            if since <= at and isinstance(value, torch.SymInt) and dim_text(dim_of(value)) == given:
                return node
        raise KeyError(f"no node holds the size {given} at position {at}")

    def users(self, name: str, after: int) -> Iterable[tuple[fx.Node, fx.Node]]:
        """Each (user, node) where `user`, placed after `after`, reads `name` through `node`."""
        for node, since in self.raised.carriers.get(name, ()):
            for user in list(node.users):
                at = self.raised.order.get(user, -1)
                if at > max(after, since) and self.holds(node, at - 1) == name:
                    yield user, node


def shape_env(raised: Raised) -> ShapeEnv | None:
    """What torch knows of a graph's symbolic sizes; None where all are numbers."""
    modes = (getattr(fake(node), "fake_mode", None) for node in raised.order if node.op == "placeholder")
    return next((mode.shape_env for mode in modes if mode is not None), None)


def lower(
    gm: fx.GraphModule, raised: Raised, graph: Graph, engine: str, grad: frozenset[str], save: str = "auto"
) -> int:
    """Rewrite `gm` in place to what `graph` says, `grad` naming values with a gradient; the number of sites lowered."""
    grad = _with_views(graph, grad)
    state = Lowering(gm, raised, engine, any_views(raised.graph), twins(raised.graph, grad), grad, save)
    opaque = {i.results[0] for i in raised.graph.instrs if i.word == "opaque"}
    unused = {node for node in gm.graph.nodes if not node.users and node.name in opaque}
    groups = groups_of(raised, graph)
    state.viewed |= _written_later(state, graph, groups)
    for root, instrs in groups.items():
        _materialise(state, root, instrs)
    if groups:
        _erase(state, groups, unused)
        gm.graph.lint()
        gm.recompile()
    return sum(i.word in SITES for instrs in groups.values() for i in instrs)


def _with_views(graph: Graph, grad: frozenset[str]) -> frozenset[str]:
    """The values with a gradient, views of parameters that passes added included."""
    found = set(grad)
    for instr in graph.instrs:
        if instr.word in ("reshape", "permute", "cast") and not found.isdisjoint(instr.uses):
            found.update(instr.results)
    return frozenset(found)


def _written_later(state: Lowering, graph: Graph, groups: Mapping[str, list[Instr]]) -> frozenset[str]:
    """The roots whose storage the user's own code goes on to write to: that storage has to hold what they are."""
    found: set[str] = set()
    for root in groups:
        at = state.raised.order[root_node(state, root)]
        for node, since in state.raised.carriers[root]:
            later = {name for name, when in state.histories[node] if when > at and name != root}
            if state.raised.order[node] < since and any(n in graph.defs and n not in groups for n in later):
                found.add(root)
    return frozenset(found)


def _lost(instrs: Iterable[Instr], groups: Mapping[str, list[Instr]]) -> list[Instr]:
    """The sites that make no value of the model: they would be called fused and never run."""
    made = {name for group in groups.values() for instr in group for name in instr.results}
    return [instr for instr in instrs if instr.word in SITES and made.isdisjoint(instr.results)]


def groups_of(raised: Raised, graph: Graph) -> dict[str, list[Instr]]:
    """What `graph` says anew: the value that is replaced → the instructions that make it, in order."""
    groups = _groups(raised, graph.instrs)
    lost = _lost(graph.instrs, groups)
    if not lost:
        return groups
    names = renamed(raised.graph)
    instrs = [more for i in graph.instrs for more in (i, *(_held_by_views(raised, names, i) if i in lost else ()))]
    groups = _groups(raised, instrs)
    still = ", ".join(instr.results[0] for instr in _lost(instrs, groups))
    assert not still, f"no value of the model is replaced by {still}"
    return groups


def _held_by_views(raised: Raised, names: Mapping[str, str], site: Instr) -> Iterator[Instr]:
    """What the model calls a site's result that no node holds, but views of it that were viewed back: that, said again.

    `stack(…) @ gates[…, None]` is a product and a view; its `.squeeze(-1)` is the product again.
    """
    for name, kept in names.items():
        if kept == site.results[0] and name in raised.carriers:
            yield Instr((name,), "same", (Ref(kept),), (raised.graph.types[name],), (), site.loc)


def _groups(raised: Raised, instrs: Iterable[Instr]) -> dict[str, list[Instr]]:
    groups: dict[str, list[Instr]] = {}
    new: dict[str, Instr] = {}
    for instr in instrs:
        if not _is_new(raised, instr, new):
            continue
        root = instr.results[0]
        if root not in raised.carriers:
            new.update(dict.fromkeys(instr.results, instr))
            continue
        mine = _needed(new, instr)
        if instr.word == "same" or any(i.word in SITES for i in mine):
            groups[root] = mine
            new = {name: other for name, other in new.items() if other not in mine}
    return groups


def _needed(new: Mapping[str, Instr], root: Instr) -> list[Instr]:
    """The new instructions that `root` needs and itself, in order: canonical forms that no site reads are left out."""
    wanted, pending = {root.results[0]}, [root]
    while pending:
        for name in pending.pop().uses:
            if name in new and name not in wanted:
                wanted.update(new[name].results)
                pending.append(new[name])
    return [*(instr for instr in dict.fromkeys(new.values()) if not wanted.isdisjoint(instr.results)), root]


def any_views(graph: Graph) -> frozenset[str]:
    """Values that were written into a storage which is also seen under another shape."""
    return frozenset(i.uses[1] for i in graph.instrs if i.word == "changed_view")


def _is_new(raised: Raised, instr: Instr, new: Mapping[str, Instr]) -> bool:
    """Whether an instruction is none of the user's: made by a pass, of another word, or of other values."""
    old = raised.graph.defs.get(instr.results[0])
    if old is None or (old.word != instr.word and instr.word in (*SITES, "add", "reshape", "same", "where")):
        return True
    return instr.word in ("add", "reshape") and old.args != instr.args and not new.keys().isdisjoint(instr.uses)


def _materialise(state: Lowering, root: str, instrs: list[Instr]) -> None:
    """Nodes for new instructions, right after the FX node whose value they replace."""
    origin = root_node(state, root)
    emit(state, instrs, origin, origin)
    _rewire(state, root, origin)


def emit(state: Lowering, instrs: list[Instr], anchor: fx.Node, origin: fx.Node) -> None:
    """Nodes for `instrs` after `anchor`, with the place in the user's code of `origin`, whose value they replace."""
    at = state.raised.order[origin]
    for instr in instrs:
        with state.gm.graph.inserting_after(anchor):
            anchor = _emit(state, instr, at - 1, origin)  # operands as they were before it: it may update one in place
        if instr.word == "moe":  # at once: what comes next reads its first result
            _results(state, instr, at)
            anchor = state.made[instr.results[0]]


def root_node(state: Lowering, root: str) -> fx.Node:
    """The node whose execution made the root value."""
    return next(node for node, since in state.raised.carriers[root] if state.raised.order[node] == since)


def _emit(state: Lowering, instr: Instr, at: int, origin: fx.Node) -> fx.Node:
    names = [ref.name if isinstance(ref, Ref) else "" for ref in instr.args]
    if instr.word == "same":  # readers of the result read what it is the same as
        state.made[instr.results[0]] = state.node(names[0], at)
        return state.made[instr.results[0]]
    if instr.word in SITES:
        node = _emit_site(state, instr, at)
    elif instr.word == "add":
        node = state.gm.graph.call_function(torch.add, (state.node(names[0], at), state.node(names[1], at)))
    elif instr.word in WORDS:
        operands = [_operand(state, arg, at) for arg in instr.args]
        if instr.word == "first_of_each":
            operands.append(state.size(instr.attr("most"), at))
        node = WORDS[instr.word](state.gm.graph, instr, operands)
    else:
        raise KeyError(f"lowering knows no FX form of `{instr.word}`")
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in origin.meta:
            node.meta[key] = origin.meta[key]
    state.made[instr.results[0]] = node
    return node


def _operand(state: Lowering, arg: Arg, at: int) -> object:
    if isinstance(arg, tuple):
        return [_operand(state, each, at) for each in arg]
    return state.node(arg.name, at) if isinstance(arg, Ref) else arg


def _emit_site(state: Lowering, instr: Instr, at: int) -> fx.Node:
    x, *routing, params = instr.args
    spec = str(instr.attr("spec"))

    def nodes(group: object) -> list[fx.Node]:
        assert isinstance(group, tuple)
        return [state.node(ref.name, at) for ref in group if isinstance(ref, Ref)]

    assert isinstance(x, Ref)
    token = state.node(x.name, at)
    if instr.word == "moe":
        if not state.grad.isdisjoint(instr.uses):
            raise VerifyError(f"%{instr.results[0]}: router and experts as one op have no gradient, but one is wanted")
        args = (token, nodes(routing[0]), nodes(params), instr.attr("k"), spec, str(_engine(state, instr)))
        return state.gm.graph.call_function(torch.ops.moec.moe.default, args)
    weights, choice = nodes(tuple(routing))
    args = (token, weights, choice, nodes(params), spec, _limited(state, instr))
    if state.grad.isdisjoint(instr.uses):
        return state.gm.graph.call_function(torch.ops.moec.experts.default, args)
    kept = state.gm.graph.call_function(torch.ops.moec.experts_training.default, (*args, state.save))
    with state.gm.graph.inserting_after(kept):
        return state.gm.graph.call_function(operator.getitem, (kept, 0))


def _engine(state: Lowering, instr: Instr) -> Engine:
    """How the op runs: as the options say, and for the range that torch knows of T where they name none."""
    engine = Engine.parse(state.engine)
    known = None if engine.tokens else TokenRange.of_dim(instr.types[0].shape[0], state.sizes)
    return engine if known is None else replace(engine, tokens=str(known))


def _limited(state: Lowering, instr: Instr) -> str:
    """The same, and no expert has more rows than the graph has seats for it."""
    limit = dict(instr.attrs).get("seats")
    engine = _engine(state, instr)
    if not isinstance(limit, str):
        return str(engine)
    return str(replace(engine, capacity=over_tokens(limit, instr.types[0].shape[0])))


def _results(state: Lowering, instr: Instr, at: int) -> None:
    """The op's four results; later readers of the router's own values read the op's."""
    op = state.made[instr.results[0]]
    replaced = instr.attr("replaces")
    assert isinstance(replaced, tuple)
    with state.gm.graph.inserting_after(op):
        state.made[instr.results[0]] = state.gm.graph.call_function(operator.getitem, (op, 0))
    for i, old in enumerate(replaced, start=1):
        users = list(state.users(str(old), at))
        with state.gm.graph.inserting_after(op):
            item = state.gm.graph.call_function(operator.getitem, (op, i))
        state.made[instr.results[i]] = item  # another site may read it; erased when nothing does
        for user, holder in users:
            user.replace_input_with(holder, item)


def _rewire(state: Lowering, root: str, origin: fx.Node) -> None:
    """Readers of the root value read the new node; an input, or a storage seen under several shapes, is updated."""
    new = state.made[root]
    is_input = any(node.op in ("placeholder", "get_attr") for node, _ in state.raised.carriers[root])
    if root in state.viewed or is_input:
        base = next(node for node, since in state.raised.carriers[root] if state.raised.order[node] < since)
        with state.gm.graph.inserting_after(new):
            state.gm.graph.call_method("copy_", (base, new))
        origin.replace_all_uses_with(base, delete_user_cb=lambda user: user is not new)
        return
    if origin not in new.all_input_nodes and new not in state.raised.order:
        new = state.made[root] = laid_out(state.gm.graph, new, origin)
    for user, holder in list(state.users(root, -1)):
        user.replace_input_with(holder, new)
    # What is written to it later is written to the new node; copies of it are written to apart.
    origin.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _erase(state: Lowering, groups: Mapping[str, list[Instr]], unused: Collection[fx.Node]) -> None:
    """Remove the nodes that nothing needs any more.

    `unused` were unused and not understood before, profiler marks say: they stay where all that they read stays.
    """
    raised = state.raised.graph
    patched = raised.with_instrs(new for old in raised.instrs for new in groups.get(old.results[0], [old]))
    made = {name for instrs in groups.values() for instr in instrs for name in instr.results}
    live = {name.partition(".")[0] for i in sweep(patched).instrs for name in i.results if name not in made}
    for node in reversed(list(state.gm.graph.nodes)):
        if node.op in ("placeholder", "output", "get_attr") or node.users or node.name in live:
            continue
        kept = node in unused and all(n.name in live or n.op == "placeholder" for n in node.all_input_nodes)
        if node in state.raised.order and not kept:
            state.gm.graph.erase_node(node)
