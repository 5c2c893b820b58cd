"""Straight-through gates outside of training: what is taken away and added again for its gradient alone is left out.

add(sub(one_hot(ids), detach(p)), p)   →   one_hot(ids)     where nothing asks for a gradient

The forward value is the mask's, up to rounding at the chosen expert and exactly 0 elsewhere: (0 − p) + p is 0. In
training every expert's gate has a gradient, so every expert counts, and the sum stays as it was written.
"""

from __future__ import annotations

from moec.ir.graph import Arg, Instr, Ref
from moec.passes.canonical.rewriter import Rewriter

_SAME = ("detach", "same")
_MASKS = ("one_hot", "scatter", "eq", "ge", "gt")


def rule_forward(state: Rewriter, instr: Instr) -> Ref | None:
    """The one term of a sum of masks and numbers that is left when all others cancel."""
    if instr.word not in ("add", "sub") or instr.results[0] in state.grad or instr.types[0].dtype not in ("f32", "f64"):
        return None
    terms: dict[Ref, int] = {}
    if not _collect(state, Ref(instr.results[0]), instr, 1, terms) or len(terms) < 2:
        return None
    left = [(term, sign) for term, sign in terms.items() if sign]
    if len(left) != 1 or left[0][1] != 1 or state.type(left[0][0]) != instr.types[0]:
        return None
    mask = state.by(state.behind(left[0][0], *_SAME, "cast"), *_MASKS)
    return left[0][0] if mask is not None else None


def _collect(state: Rewriter, arg: Arg, made: Instr | None, sign: int, terms: dict[Ref, int]) -> bool:
    """Add what a sum is of to `terms`, each with how often it counts; False where there is a number among them."""
    if not isinstance(arg, Ref):
        return False
    if made is None or made.word not in ("add", "sub") or len(made.args) != 2:
        terms[arg] = terms.get(arg, 0) + sign
        return True
    signs = (sign, sign if made.word == "add" else -sign)
    for each, of in zip(made.args, signs, strict=True):
        inner = state.behind(each, *_SAME)
        if not _collect(state, inner, state.by(inner, "add", "sub"), of, terms):
            return False
    return True
