"""A loop that reads the tensor that it writes to: what an expert reads, experts before it may have changed.

for e: x[rows] += f(x[rows])   →   head = carry(x); x' = index_put(head, …f(index(head, rows))…, rows)

Without `carry`, the head of an iteration would be the tensor before the loop. Where each token has one expert it is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from moec.graph import Graph, Instr, Ref
from moec.match import NoMatch
from moec.passes.body import BodyMatch
from moec.passes.combine import Combined
from moec.passes.raise_graph import Builder, fake, storage_key
from moec.passes.token_axes import choice_axes
from moec.passes.updates import is_update
from moec.passes.words import key_of

_END = "moec.end"
_HINT = "read the rows from the tensor as it was before the loop, and add to a copy: `y = x.clone()`"


def hold_heads(build: Builder, anchor: fx.Node, item: Ref) -> None:
    """Where a rolled loop begins: each storage that its body both reads and writes holds another value every turn."""
    body = list(_body(anchor))
    written = {storage_key(node.args[0]) for node in body if _writes(node)}  # type: ignore[arg-type]
    if not written:
        return
    born = {storage_key(n) for n in body if not any(storage_key(n) == storage_key(a) for a in n.all_input_nodes)}
    for key in written - born - {None}:
        if not any(_reads(node, key) for node in body):
            continue
        heads: dict[str, Ref] = {}
        for alias in build.aliases.get(key, ()):  # type: ignore[arg-type]
            held = build.env[alias]
            if not isinstance(held, Ref):
                continue
            if held.name not in heads:
                heads[held.name] = build.emit("carry", (held, item), build.type_of(held))
            build.env[alias] = heads[held.name]  # no carrier: without the loop, the node holds what it held before


def _body(anchor: fx.Node) -> Iterator[fx.Node]:
    node = anchor.next
    while node.op != "root" and key_of(node) != _END:
        if node.op.startswith("call"):
            yield node
        node = node.next


def _writes(node: fx.Node) -> bool:
    target = bool(node.args) and isinstance(node.args[0], fx.Node)
    return target and (node.target is operator.setitem or is_update(node, key_of(node)))


def _reads(node: fx.Node, key: int | None) -> bool:
    """Whether a node reads elements of a storage, other than to add to them where they are."""
    if not isinstance(fake(node), (torch.Tensor, tuple, list)) or not any(
        storage_key(a) == key for a in node.all_input_nodes
    ):
        return False
    if storage_key(node) == key:  # a view, or an update: what is written may be read from it
        return any(storage_key(a) == key for a in node.all_input_nodes[1:])
    return not _only_added_to(node)


def _only_added_to(node: fx.Node) -> bool:
    """The old rows in `y[i] = y[i] + r`."""
    if node.target is not operator.getitem:
        return False
    base, index = node.args
    for add in node.users:
        if key_of(add) not in ("add", "add_", "iadd"):
            return False
        for put in add.users:
            if put.target is not operator.setitem or put.args[:2] != (base, index) or put.args[2] is not add:
                return False
    return True


def body_as_before(graph: Graph, body: BodyMatch, total: Combined, root: Instr) -> BodyMatch | NoMatch:
    """The body with its rows taken from the tensor as it was before the loop, where a turn reads no other turn's."""
    made = graph.defs.get(body.token)
    if made is None or made.word != "carry":
        return body
    own = root.args[0] == Ref(body.token) and total.rows.choice in graph.types
    chosen = graph.types.get(total.rows.choice)
    slots = chosen is not None and "s" in choice_axes(graph, total.rows.choice)
    one = chosen is not None and (not slots or chosen.shape[-1] == 1)
    if not own or not one or not isinstance(made.args[0], Ref):
        return _later(made)
    return replace(body, token=made.args[0].name)


def reread(graph: Graph, anchor: str, root: Instr) -> NoMatch | None:
    """Why a loop's experts may read what others wrote, or None; for experts that keep code of their own."""
    added = root.uses[1:2] if root.word == "index_put" else ()
    for instr in graph.instrs:
        if instr.word != "carry" or instr.uses[-1:] != (anchor,) or root.uses[:1] != instr.results:
            continue
        for user in graph.users.get(instr.results[0], ()):
            sums = {u.results[0] for u in graph.users.get(user.results[0], ())}
            if user is not root and not (user.word == "index" and sums <= set(added)):
                return _later(instr)
    return None


def _later(made: Instr) -> NoMatch:
    before = made.uses[0]
    why = (
        f"the loop reads rows of %{before} that it also adds to: a token's later expert reads what an earlier one added"
    )
    return NoMatch(why, made.results[0], 6, hint=_HINT)
