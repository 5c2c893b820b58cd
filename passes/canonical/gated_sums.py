"""A sum of experts' gated rows and of other terms is the other terms plus the experts' sum.

x + g₀·f₀(x) + shared(x) + g₁·f₁(x)   →   (x + shared(x)) + (g₀·f₀(x) + g₁·f₁(x))
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.ir.graph import Arg, Graph, Instr, Ref
from moec.passes.canonical.rewriter import Rewriter, again
from moec.passes.rows.sums import APART, part_of_sum


def rule_apart(state: Rewriter, instr: Instr) -> Instr | None:
    """The outermost addition of such a sum."""
    if instr.word != "add" or instr.types[0].rank < 2 or part_of_sum(state.graph, instr):
        return None
    terms = _terms(state, instr)
    gated = [term for term in terms if _is_gated(state, term)]
    others = [term for term in terms if term not in gated and not state.is_zero(term)]
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
        alike = made is not None and all(state.type(a) == instr.types[0] for a in made.args if isinstance(a, Ref))
        if made is not None and alike and made.types == instr.types and _is_step(state.graph, made):
            pending += reversed(made.args)
        else:
            found.append(arg)
    return found


def _sum(state: Rewriter, instr: Instr, terms: Sequence[Arg]) -> Arg:
    total = terms[0]
    for term in terms[1:]:
        total = state.emit("add", (total, term), instr.types[0])
    return total


def _is_step(graph: Graph, add: Instr) -> bool:
    """Whether an addition, the model's or one that rules made, is a step of the sum that reads it."""
    emitted = add.results[0] not in graph.defs and APART not in dict(add.attrs)
    return emitted or part_of_sum(graph, add)


def _is_gated(state: Rewriter, arg: Arg) -> bool:
    """Whether a term is rows times a number a row that differs by expert."""
    made = state.by(arg, "mul")
    if made is None or len(made.uses) != 2:
        return False
    kinds = [state.type(each) for each in made.args]
    numbers = [a for a, k in zip(made.args, kinds, strict=True) if k.rank == kinds[0].rank and k.shape[-1] == 1]
    return kinds[0].rank >= 2 and any(_by_expert(state, number) for number in numbers)


def _by_expert(state: Rewriter, number: Arg) -> bool:
    """Whether gates are a column of more, or a mask that asks for a number; or a product of such."""
    pending, seen = [number], {number}
    while pending:
        made = state.by(state.behind(pending.pop(), "reshape", "cast", "same"), "slice", "eq", "mul")
        if made is None:
            continue
        if made.word == "eq" or (made.word == "slice" and _is_column(made)):
            return True
        if made.word == "mul":
            pending += [each for each in made.args if each not in seen]
            seen.update(made.args)
    return False


def _is_column(cut: Instr) -> bool:
    kind = cut.types[0]
    return cut.attr("dim") == kind.rank - 1 and kind.shape[-1] == 1
