"""The row rules of masks, loops and arithmetic; RULES is the whole table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moec.ir.expr import POINTWISE
from moec.ir.graph import Arg, Instr, Ref
from moec.ir.match import NoMatch
from moec.passes.dispatch import index_rules, listed
from moec.passes.dispatch.every import with_every
from moec.passes.dispatch.firsts import firsts, rule_first
from moec.passes.dispatch.kept import kept_mask
from moec.passes.dispatch.mask_rules import (
    masked_weights,
    places,
    rule_and,
    rule_compare,
    rule_invert,
    rule_one_hot,
    rule_reduce,
    rule_where_indices,
)
from moec.passes.dispatch.partial import skip_side
from moec.passes.dispatch.product_rules import rule_contract, rule_grouped
from moec.passes.dispatch.row_weights import with_row_weights
from moec.passes.dispatch.runs import with_runs
from moec.passes.dispatch.served import rule_masked_fill
from moec.passes.dispatch.slot_cuts import with_cuts
from moec.passes.dispatch.slot_rows import with_slots
from moec.passes.dispatch.thresholds import column, compared
from moec.passes.rows import lift as base
from moec.passes.rows.coded import cast_expert, scaled
from moec.passes.rows.lift import Lift, Lifter, Rule, per_expert, tried_first
from moec.passes.rows.rows import (
    Anchor,
    Apply,
    Column,
    Expert,
    Gates,
    Idle,
    Ids,
    Number,
    OneHot,
    PerExpert,
    Row,
    Rows,
    Side,
    Slice,
    Slot,
    Space,
    compatible,
    merged,
)


def rule_anchor(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """A loop over all experts, or over those that have rows."""
    if instr.word == "anchor_range":
        start, _end, step, *_ = instr.args
        if start != 0 or step != 1:
            return NoMatch(
                f"the loop starts at {start} with step {step}, expected every expert from 0", instr.results[0]
            )
        return Anchor(instr.results[0])
    items = lifter.lift(instr.args[0])
    if isinstance(items, PerExpert) and items.what == "hits":
        return Anchor(instr.results[0], items.choice)
    return (
        items
        if isinstance(items, NoMatch)
        else NoMatch("the loop is not over the experts that have rows", instr.results[0])
    )


def rule_skip(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """Skipping an expert that has no rows, or an id that no expert has, changes nothing."""
    item = lifter.lift(instr.args[0])
    if instr.word == "skip_size":
        return item
    why = lifter.lift(instr.args[1])
    if isinstance(item, Anchor) and isinstance(why, Idle) and why.idle and why.anchor == item.name:
        lifter.asked.setdefault(item.name, set()).add(why.choice)
        return item
    if isinstance(item, Anchor) and isinstance(why, Side) and why.anchor == item.name:
        return skip_side(lifter, item, why) or NoMatch("two skips leave different experts", instr.results[0])
    return NoMatch("an iteration is skipped for another reason than having no rows", instr.results[0])


def rule_take(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """table[e]: an expert's slice of a parameter, or the mask of its rows."""
    table, item = instr.args
    anchor, held = lifter.lift(item), lifter.lift(table)
    if not isinstance(anchor, Anchor):
        return (
            anchor
            if isinstance(anchor, NoMatch)
            else NoMatch("taken at something else than the loop's expert", instr.results[0])
        )
    whole = lifter.type(table).dtype not in base.FLOATS
    if isinstance(held, NoMatch) or (isinstance(held, Gates) and whole):
        held = kept_mask(lifter, table) or held
    made = lifter.instr(table)
    turned = made is not None and made.word == "permute" and made.attr("dims") == (1, 0)
    if turned and made is not None and isinstance(lifter.lift(made.args[0]), Rows) and isinstance(held, NoMatch):
        held = Gates(made.uses[0])  # scores of tokens, which could be rows of a batch of experts
    if isinstance(held, Gates):
        return column(lifter, held, anchor)
    if isinstance(held, OneHot) and held.axes[0] == "e":
        return OneHot(held.choice, held.axes[1:], anchor.name)
    if isinstance(held, Expert) and held.stacked:
        return held
    if isinstance(table, Ref) and isinstance(held, NoMatch):
        return Expert((table.name,), tuple(range(lifter.type(table).rank - 1)), True)
    return NoMatch(f"{type(held).__name__} taken at the loop's expert", instr.results[0])


def rule_pick(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """[p_0 … p_E−1][e]: an expert's own tensor."""
    tables, item = instr.args
    if not isinstance(lifter.lift(item), Anchor) or not isinstance(tables, tuple):
        return NoMatch("picked at something else than the loop's expert", instr.results[0])
    names = tuple(t.name for t in tables if isinstance(t, Ref))
    return Expert(names, tuple(range(instr.types[0].rank)), False)


def rule_slice(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """A range of features of every row; one column of a mask's places; the first item of a loop's item list."""
    source = lifter.type(instr.args[0])
    dim, start, stop, step = (instr.attr(n) for n in ("dim", "start", "stop", "step"))
    column = _column(lifter, instr.args[0], dim, start, stop)
    if column is not None:
        return column
    inner = lifter.lift(instr.args[0])
    if isinstance(inner, Rows) and isinstance(dim, int) and inner.lead <= dim == source.rank - 1:
        return replace(inner, row=Slice(inner.row, int(str(start)), int(str(stop)), int(str(step))))
    if isinstance(inner, Anchor | Ids):
        return NoMatch("a slice of index values", instr.results[0])
    return inner if isinstance(inner, NoMatch) else NoMatch(f"slice along axis {dim}", instr.results[0])


def _column(lifter: Lifter, pairs: Arg, dim: object, start: object, stop: object) -> Lift | None:
    """nonzero(mask[T, k])[:, j], nonzero(mask[T, k]).T[j]: the token, or the slot, of each of the loop's rows."""
    made = lifter.instr(pairs)
    if dim == 0 and made is not None and made.word == "permute" and made.attr("dims") == (1, 0):
        made, dim = lifter.instr(made.args[0]), 1
    if dim != 1:
        return None
    cut = made if made is not None and made.word == "first" else None
    made = lifter.instr(cut.args[0]) if cut is not None else made
    mask = lifter.lift(made.args[0]) if made is not None and made.word == "nonzero" else None
    if not isinstance(mask, OneHot) or not mask.anchor or set(mask.axes) != {"t", "s"}:
        return None
    if not isinstance(start, int) or not isinstance(stop, int) or start not in (0, 1) or stop != start + 1:
        return None
    found = places(lifter, mask, start)
    return found if cut is None or found is None else firsts(lifter, found, cut)


def rule_pointwise(lifter: Lifter, instr: Instr, _which: int) -> Lift:
    """A pointwise function of rows, experts' vectors and numbers; of a mask and weights, the masked weights."""
    product = masked_weights(lifter, instr) or scaled(lifter, instr) if len(instr.args) == 2 else None
    if product is not None:
        return product
    args: list[Row] = []
    lead: Rows | None = None
    for arg in instr.args:
        if isinstance(arg, (int, float)):
            args.append(Number(float(arg)))
            continue
        inner = lifter.lift(arg)
        if isinstance(inner, NoMatch):
            inner = _only_slot(lifter, instr, arg) or inner
        if isinstance(inner, NoMatch) or _one_feature(lifter, arg, instr, inner):
            return inner if isinstance(inner, NoMatch) else NoMatch("rows and a number a row on a grid", str(arg))
        if isinstance(inner, Rows):
            if lifter.type(arg).rank != instr.types[0].rank:
                return NoMatch(
                    f"`{instr.word}` of {lifter.type(arg)} gives {instr.types[0]}: other rows", instr.results[0]
                )
            if lead is not None and (lead.layout != inner.layout or not compatible(lead.space, inner.space)):
                return NoMatch(
                    f"`{instr.word}` of {lead.space.kind}/{lead.layout} and {inner.space.kind}/{inner.layout} rows",
                    instr.results[0],
                )
            if lead is not None and lead.choice and inner.choice and lead.choice != inner.choice:
                return NoMatch(f"`{instr.word}` of rows of different choices", instr.results[0])
            lead = merged(lead, inner)
            args.append(inner.row)
        elif isinstance(inner, Expert) and len(inner.order) == 1:
            args.append(inner)
        else:
            return NoMatch(f"`{instr.word}` of {type(inner).__name__}", instr.results[0])
    if lead is None:
        return NoMatch(f"`{instr.word}` of no rows", instr.results[0])
    return replace(lead, row=Apply(instr.word, tuple(args)))


def rule_cast(lifter: Lifter, instr: Instr, which: int) -> Lift:
    """A cast of an expert's tensor, or of rows."""
    inner = lifter.lift(instr.args[0])
    if isinstance(inner, Column):
        kept = compared(lifter, "ne", instr.args[0], 0.0) if instr.types[0].dtype == "bool" else None
        return kept or NoMatch("a column of gates in another dtype", instr.results[0])
    if isinstance(inner, Rows) and isinstance(inner.row, Expert):
        row = cast_expert(instr, inner.row)
        return row if isinstance(row, NoMatch) else replace(inner, row=row)
    return cast_expert(instr, inner) if isinstance(inner, Expert) else base.rule_cast(lifter, instr, which)


def _one_feature(lifter: Lifter, arg: Arg, instr: Instr, held: Lift) -> bool:
    """Whether a row on a grid has one number where the result has a row of features."""
    kind, to = lifter.type(arg), instr.types[0]
    if not isinstance(held, Rows) or held.space.kind != "grid":
        return False
    return kind.rank >= 2 and kind.shape[-1] == 1 and to.shape[-1] != 1


def _only_slot(lifter: Lifter, instr: Instr, arg: Arg) -> Rows | None:
    """w[T, 1] beside rows of one slot a token, where w.reshape(-1, 1) is w itself: its number for each row."""
    kind = lifter.type(arg)
    if not isinstance(arg, Ref) or kind.dtype not in base.FLOATS or kind.rank != 2 or kind.shape[1] != 1:
        return None
    others = [lifter.lift(other) for other in instr.args if other != arg]
    rows = [r for r in others if isinstance(r, Rows) and r.space == Space("slots", 1) and r.layout == "flat"]
    return Rows(rows[0].space, Slot(arg.name)) if rows else None


_OWN: Mapping[str, Rule] = {
    **dict.fromkeys(POINTWISE, rule_pointwise),
    "pow": rule_pointwise,
    "rsqrt": rule_pointwise,
    "reshape": base.rule_reshape,
    "permute": base.rule_permute,
    "cast": rule_cast,
    "same": base.rule_same,
    "index": index_rules.rule_index,
    "gather": index_rules.rule_gather,
    "sort": index_rules.rule_sort,
    # Places are not negative.
    **dict.fromkeys(("floor_divide", "truncate_divide"), index_rules.rule_floor_divide),
    "remainder": index_rules.rule_remainder,
    "mod": index_rules.rule_remainder,
    "index_put": index_rules.rule_index_put,
    "scatter": index_rules.rule_index_put,
    "repeat_interleave": index_rules.rule_repeat_interleave,
    "expand": index_rules.rule_expand,
    "repeat": index_rules.rule_repeat,
    "counts": lambda lifter, instr, which: _counts(lifter, instr),
    "cumsum": per_expert("offsets", "counts"),
    "one_hot": rule_one_hot,
    "reduce_sum": rule_reduce,
    "reduce_any": rule_reduce,
    "eq": rule_compare,
    "ne": rule_compare,
    "gt": rule_compare,
    "ge": rule_compare,
    "lt": rule_compare,
    "le": rule_compare,
    "invert": rule_invert,
    **dict.fromkeys(("bitwise_and", "logical_and"), rule_and),
    "masked_fill": rule_masked_fill,
    "unique": lambda lifter, instr, which: _unique(lifter, instr),
    "anchor": rule_anchor,
    "anchor_range": rule_anchor,
    "skip": rule_skip,
    "skip_size": rule_skip,
    "take": rule_take,
    "pick": rule_pick,
    "where_indices": rule_where_indices,
    "nonzero": rule_where_indices,
    "slice": rule_slice,
    "first": rule_first,
    "contract": rule_contract,
    "grouped": rule_grouped,
}

_OF_SLOTS = with_cuts(with_row_weights(with_slots(tried_first(with_runs(_OWN), listed.BEFORE))))
RULES: Mapping[str, Rule] = with_every(_OF_SLOTS)


def _unique(lifter: Lifter, instr: Instr) -> Lift:
    """The experts that occur among the choices: those that have rows. A sentinel such as −1 would be one of them."""
    inner = lifter.lift(instr.args[0])
    if isinstance(inner, NoMatch):
        inner = index_rules.choice_of(lifter, lifter.graph.behind(instr.args[0], ("cast", "same")), inner)
    if not isinstance(inner, Ids) or inner.what != "expert":
        miss = NoMatch("the distinct values of something else than choices", instr.results[0])
        return inner if isinstance(inner, NoMatch) else miss
    made = lifter.instr(lifter.graph.behind(Ref(inner.choice), ("cast", "same", "reshape", "permute", "detach")))
    if made is None or made.word not in ("topk", "max", "sort"):
        return NoMatch("the distinct values of choices that may hold others than experts", instr.results[0])
    return PerExpert("hits", inner.choice)


def _counts(lifter: Lifter, instr: Instr) -> Lift:
    """How many rows each expert has."""
    inner = lifter.lift(instr.args[0])
    if isinstance(inner, NoMatch):  # [T, k] as it was chosen
        inner = index_rules.choice_of(lifter, lifter.graph.behind(instr.args[0], ("cast", "same")), inner)
    if isinstance(inner, Ids) and inner.what == "expert":
        size = instr.types[0].shape[0]
        return PerExpert("counts", inner.choice, int(size) if size.is_Integer else None)
    return (
        inner if isinstance(inner, NoMatch) else NoMatch("counts something else than experts' rows", instr.results[0])
    )
