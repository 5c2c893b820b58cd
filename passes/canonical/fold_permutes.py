"""Transposes move into contractions: contract(x, permute(w)) is contract(x, w) with the letters of w swapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from moec.ir.graph import Arg, Graph, Instr, Ref
from moec.passes.raising.word_contract import equation_of, normal_equation


def fold_permutes(graph: Graph) -> Iterator[Instr]:
    """contract(permute(w)) → contract(w)."""
    for instr in graph.instrs:
        yield folded(graph.defs, instr) if instr.word == "contract" else instr


def folded(defs: Mapping[str, Instr], instr: Instr) -> Instr:
    """The contraction, reading its operands as they are before they are permuted."""
    letters, out = equation_of(instr)
    args: list[Arg] = []
    for i, arg in enumerate(instr.args):
        made = defs.get(arg.name) if isinstance(arg, Ref) else None
        if made is None or made.word != "permute" or _is_rows(letters, i, out):
            args.append(arg)
            continue
        dims = made.numbers("dims")
        stored = [""] * len(dims)
        for letter, dim in zip(letters[i], dims, strict=True):
            stored[dim] = letter
        letters[i] = "".join(stored)
        args.append(made.args[0])
    if tuple(args) == instr.args:
        return instr
    eq = normal_equation(f"{','.join(letters)}->{out}")
    return replace(instr, args=tuple(args), attrs=(("eq", eq),))


def _is_rows(letters: list[str], i: int, out: str) -> bool:
    """Whether an operand is tokens with their features last, [B, S, H] times [H, F]: as stored they may not be."""
    mine, other = letters[i], letters[1 - i]
    return len(mine) > 2 and mine[:-1] == out[:-1] and set(mine) & set(other) == {mine[-1]} and len(other) == 2
