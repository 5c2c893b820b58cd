"""A loop that reads the tensor that it writes to: what an expert reads, experts before it may have changed.

Raising says so by a `carry` (`moec.passes.raising.heads`); where each token has one expert, its rows are those of the
tensor before the loop.
"""

from __future__ import annotations

from dataclasses import replace

from moec.ir.graph import Graph, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.dispatch.combine import Combined
from moec.passes.rows.body import BodyMatch
from moec.passes.rows.token_axes import one_expert

_HINT = "read the rows from the tensor as it was before the loop, and add to a copy: `y = x.clone()`"


def body_as_before(graph: Graph, body: BodyMatch, total: Combined, root: Instr) -> BodyMatch | NoMatch:
    """The body with its rows taken from the tensor as it was before the loop, where a turn reads no other turn's."""
    made = graph.defs.get(body.token)
    if made is None or made.word != "carry":
        return body
    own = root.args[0] == Ref(body.token)
    if not own or not one_expert(graph, total.rows.choice) or not isinstance(made.args[0], Ref):
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
