"""The row rules of grids as a table, and how two tables of rules are joined."""

from __future__ import annotations

from collections.abc import Mapping

from moec.ir.graph import Instr
from moec.ir.match import NoMatch, nearest
from moec.passes.grid import picked
from moec.passes.grid import rows as grid
from moec.passes.grid import stack as grid_stack
from moec.passes.grid.flat_seats import FLAT_SEATS
from moec.passes.rows.lift import Lift, Lifter, Rule, tried_first

VIEWS: Mapping[str, Rule] = {
    "reshape": grid.rule_reshape,
    "permute": grid.rule_permute,
    "slice": grid.rule_slice,
    "cat": grid_stack.rule_stack,
    "stack": grid_stack.rule_stack,
    "expand": grid.rule_expand,
}
"""Tried before other rules, which know rows of other spaces alone."""

PRODUCTS: Mapping[str, Rule] = {
    "contract": grid.rule_contract,
    "add": grid.rule_pointwise,
    "mul": grid.rule_pointwise,
}
"""Tried after other rules."""

PICKED: Mapping[str, Rule] = {"contract": picked.rule_contract}


def either(first: Mapping[str, Rule], second: Mapping[str, Rule]) -> Mapping[str, Rule]:
    """The rules of both tables; where a word is in both, the first that knows a value's meaning says it."""

    def joined(word: str) -> Rule:
        a, b = first[word], second[word]

        def rule(lifter: Lifter, instr: Instr, which: int) -> Lift:
            found = a(lifter, instr, which)
            if not isinstance(found, NoMatch):
                return found
            other = b(lifter, instr, which)
            return nearest([found, other]) if isinstance(other, NoMatch) else other

        return rule

    return {**first, **second, **{word: joined(word) for word in first if word in second}}


def with_grids(rules: Mapping[str, Rule]) -> Mapping[str, Rule]:
    """A table of row rules that knows rows on grids too."""
    known = either(VIEWS, either(either(rules, PICKED), PRODUCTS))
    return tried_first(known, FLAT_SEATS)
