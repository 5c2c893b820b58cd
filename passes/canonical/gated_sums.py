"""A sum of experts' gated rows and of other terms is the other terms plus the experts' sum.

x + g₀·f₀(x) + shared(x) + g₁·f₁(x)   →   (x + shared(x)) + (g₀·f₀(x) + g₁·f₁(x))
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.ir.graph import Arg, Graph, Instr, Ref
from moec.passes.canonical.rewriter import Rewriter, again
from moec.passes.rows.rows import APART


def rule_apart(state: Rewriter, instr: Instr) -> Instr | None:
    """The outermost addition of such a sum."""
    if instr.word != "add" or instr.types[0].rank < 2 or _goes_on(state.graph, instr):
        return None
    terms = _terms(state, instr)
    gated = [term for term in terms if _is_gated(state, term)]
    others = [term for term in terms if term not in gated and not _is_zero(state, term)]
    if len(gated) < 2 or not others or any(state.type(t) != instr.types[0] for t in (*gated, *others)):
        return None
    whole = _sum(state, instr, gated[:-1])
    experts = state.emit("add", (whole, gated[-1]), instr.types[0], **{APART: True})
    return again(instr, "add", (_sum(state, instr, others), experts))


def _terms(state: Rewriter, instr: Instr) -> list[Arg]:
    """What a chain of additions adds; a sum that something else reads too, or that was set apart, is one term."""
    found: list[Arg] = []
    pending = list(reversed(instr.args))
    while pending:
        arg = pending.pop()
        made = state.by(arg, "add")
        own = isinstance(arg, Ref) and (arg.name not in state.graph.defs or _once(state.graph, arg.name))
        alike = made is not None and all(state.type(a) == instr.types[0] for a in made.args if isinstance(a, Ref))
        if made is not None and own and alike and made.types == instr.types and APART not in dict(made.attrs):
            pending += reversed(made.args)
        else:
            found.append(arg)
    return found


def _sum(state: Rewriter, instr: Instr, terms: Sequence[Arg]) -> Arg:
    total = terms[0]
    for term in terms[1:]:
        total = state.emit("add", (total, term), instr.types[0])
    return total


def _once(graph: Graph, name: str) -> bool:
    """Whether one value reads this one, and not as x + x."""
    users = graph.users.get(name, ())
    return len(users) == 1 and users[0].args.count(Ref(name)) == 1 and name not in graph.outputs


def _goes_on(graph: Graph, instr: Instr) -> bool:
    """Whether a longer sum takes the value."""
    users = graph.users.get(instr.results[0], ())
    return _once(graph, instr.results[0]) and users[0].word == "add" and users[0].types == instr.types


def _is_gated(state: Rewriter, arg: Arg) -> bool:
    """Whether a term is rows times a number a row that differs by expert."""
    made = state.by(arg, "mul")
    if made is None or len(made.uses) != 2:
        return False
    kinds = [state.type(each) for each in made.args]
    numbers = [a for a, k in zip(made.args, kinds, strict=True) if k.rank == kinds[0].rank and k.shape[-1] == 1]
    return kinds[0].rank >= 2 and any(_by_expert(state, number) for number in numbers)


def _by_expert(state: Rewriter, number: Arg) -> bool:
    """Whether gates are a column of more, or a mask that asks for a number."""
    made = state.by(state.behind(number, "reshape", "cast", "same"), "slice", "eq", "mul")
    if made is None or made.word == "eq":
        return made is not None
    if made.word == "mul":
        return any(_by_expert(state, each) for each in made.args)
    return made.attr("dim") == made.types[0].rank - 1 and made.types[0].shape[-1] == 1


def _is_zero(state: Rewriter, arg: Arg) -> bool:
    made = state.by(arg, "full")
    return arg in (0, 0.0) if not isinstance(arg, Ref) else made is not None and made.attr("value") == 0.0
