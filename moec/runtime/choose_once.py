"""Under activation checkpointing a choice of experts is made once: where numbers become a choice, that choice is saved.

The backward pass computes a checkpointed block again, and with it the scores of the router; were the choice made again
too, a last bit that differs would send a token to other experts than forward did.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from moec.capture.effects import viewed, written
from moec.passes.raising.raise_graph import fake
from moec.passes.raising.words import key_of

_CONTEXT = "_checkpoint_context_fn"  # where Dynamo keeps the checkpoint's own `context_fn`, and reads it from
_SAYS = {"argsort": "sort"}
"""What torch runs for a word that is none of its own operators."""


def choose_once(block: fx.GraphModule) -> frozenset[str]:
    """Have `block`, the graph of a checkpointed block with sites, save the choices that sites read; by which operators.

    All results of these operators in the block are saved: a policy sees operators, not nodes. A block whose user says
    what is saved (`context_fn`) is left alone. Changes the graph.
    """
    sites = [n for n in block.graph.nodes if str(n.target).startswith("moec.experts")]
    if not sites or _CONTEXT in block.meta:
        return frozenset()
    chosen = frozenset(key_of(node) for site in sites for node in _choosing(site.args[2]))
    for node in [n for n in block.graph.nodes if n.op.startswith("call") and key_of(n) in chosen]:
        _keep_apart(block.graph, node)
    if chosen:
        names = frozenset(_SAYS.get(name, name) for name in chosen)
        block.meta[_CONTEXT] = partial(create_selective_checkpoint_contexts, partial(_policy, names))
        block.recompile()
    return chosen


def _policy(chosen: frozenset[str], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Choices are saved, everything else is computed again, as without a policy."""
    name = str(getattr(op, "_schema", op)).partition("(")[0].rpartition("::")[2].partition(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in chosen else CheckpointPolicy.PREFER_RECOMPUTE


def _choosing(choice: Any) -> Iterator[fx.Node]:
    """The nodes behind a choice that make whole numbers or masks from numbers."""
    pending, seen = [choice], {choice}
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node.op in ("placeholder", "get_attr"):
            continue
        if any(_is_float(arg) for arg in node.all_input_nodes):
            yield node
            continue
        new = [arg for arg in node.all_input_nodes if arg not in seen]
        seen.update(new)
        pending.extend(new)


def _is_float(node: fx.Node) -> bool:
    value = fake(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _chain(tensor: fx.Node | None) -> Iterator[fx.Node]:
    """A tensor and what it is a view of."""
    while tensor is not None:
        yield tensor
        tensor = viewed(tensor)


def _keep_apart(graph: fx.Graph, made: fx.Node) -> None:
    """What is saved must stay as it is: a result that is updated in place (`w /= w.sum()`) is copied first."""
    updated = {view for node in graph.nodes for tensor in written(node) for view in _chain(tensor)}
    for result in (made, *made.users):
        if result in updated and isinstance(fake(result), torch.Tensor):
            with graph.inserting_after(result):
                copy = graph.call_method("clone", (result,))
            copy.meta = dict(result.meta)
            result.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
