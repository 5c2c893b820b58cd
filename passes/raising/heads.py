"""A rolled loop that reads the tensor that it writes to: in each iteration that tensor is another value.

for e: x[rows] += f(x[rows])   →   head = carry(x); x' = index_put(head, …f(index(head, rows))…, rows)

Without `carry`, the head of an iteration would be the tensor before the loop.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from moec.ir.graph import Ref
from moec.passes.raising.raise_graph import Builder, fake, storage_key
from moec.passes.raising.updates import is_update
from moec.passes.raising.words import key_of

_END = "moec.end"


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
