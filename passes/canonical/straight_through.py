"""Straight-through gates outside of training: what is taken away and added again for its gradient alone is left out.

add(sub(one_hot(ids), detach(p)), p)   →   one_hot(ids)     where nothing asks for a gradient

The forward value is the mask's, up to rounding at the chosen expert and exactly 0 elsewhere: (0 − p) + p is 0. In
training every expert's gate has a gradient, so every expert counts, and the sum stays as it was written.
"""

from __future__ import annotations

from moec.ir.graph import Instr, Ref
from moec.passes.canonical.rewriter import Rewriter

_SAME = ("detach", "same")
MOST = 8  # additions and subtractions in a gate
_MASKS = ("one_hot", "scatter", "eq", "ge", "gt")


def rule_forward(state: Rewriter, instr: Instr) -> Ref | None:
    """The one term of a sum of masks and numbers that is left when all others cancel."""
    if instr.word not in ("add", "sub") or instr.results[0] in state.grad or instr.types[0].dtype not in ("f32", "f64"):
        return None
    terms = _terms(state, instr)
    if len(terms) < 2:
        return None
    left = [(term, sign) for term, sign in terms.items() if sign]
    if len(left) != 1 or left[0][1] != 1 or state.type(left[0][0]) != instr.types[0]:
        return None
    mask = state.by(state.behind(left[0][0], *_SAME, "cast"), *_MASKS)
    return left[0][0] if mask is not None else None


def _terms(state: Rewriter, instr: Instr) -> dict[Ref, int]:
    """How often each term counts in a sum; nothing where it is of numbers too, or longer than such a gate is."""
    terms: dict[Ref, int] = {}
    pending = [(instr, 1)]
    for _ in range(MOST):
        if not pending:
            return terms
        made, sign = pending.pop()
        signs = (sign, sign if made.word == "add" else -sign)
        for arg, counts in zip(made.args, signs, strict=False):
            if not isinstance(arg, Ref) or len(made.args) != 2:
                return {}
            inner = state.behind(arg, *_SAME)
            further = state.by(inner, "add", "sub")
            if further is not None:
                pending.append((further, counts))
            elif isinstance(inner, Ref):
                terms[inner] = terms.get(inner, 0) + counts
    return {}
