"""What a rolled loop leaves out: an iteration may be skipped only where its expert has no rows."""

from __future__ import annotations

from moec.ir.graph import Instr, Ref, loop_of
from moec.ir.match import NoMatch
from moec.passes.dispatch.gate_columns import leaves_out_zeros
from moec.passes.rows.body import BodyMatch
from moec.passes.rows.lift import Lifter
from moec.passes.rows.rows import Anchor, Ids


def only_idle_skipped(lifter: Lifter, anchor: str) -> NoMatch | None:
    """Why an iteration of the loop may be skipped although its expert has rows, or None."""
    for instr in lifter.graph.skips:
        if loop_of(lifter.graph, instr) != anchor:
            continue
        item = lifter.lift_result(instr)
        if isinstance(item, NoMatch):
            return item
        if not isinstance(item, Anchor):
            return NoMatch(f"a skip of {type(item).__name__}, expected of the loop's expert", instr.results[0])
        if instr.word == "skip_size" and not _counts_rows(lifter, instr, anchor):
            reason = f"an iteration is skipped where {instr.args[1]} is 0, expected the number of the expert's rows"
            return NoMatch(reason, instr.results[0])
    return None


def _counts_rows(lifter: Lifter, skip: Instr, anchor: str) -> bool:
    """Whether a size is 0 exactly where the loop's expert has no rows."""
    size = skip.args[1]
    if isinstance(size, int):
        return size != 0
    for instr in lifter.graph.instrs:
        if not instr.types or not instr.types[0].shape or str(instr.types[0].shape[0]) != str(size):
            continue
        rows = lifter.lift_result(instr)
        if isinstance(rows, Ids) and rows.space.kind == "loop" and rows.space.key == anchor:
            return True
    return False


def asked_of_others(lifter: Lifter, anchor: str, choice: str, body: BodyMatch | None = None) -> NoMatch | None:
    """Why the experts that a loop passes over may have rows by `choice`, another one than it asked, or None."""
    made = lifter.graph.defs[anchor]
    item = lifter.lift(Ref(anchor)) if made.word == "anchor" else None
    asked = {*lifter.asked.get(anchor, ()), *((item.choice,) if isinstance(item, Anchor) else ())}
    for other in sorted(asked - {"", choice}):
        same = {_whole(lifter, choice, "slice"), _whole(lifter, choice)}  # its columns are among all that was asked
        part = choice.startswith(f"{other}#") or (body is not None and leaves_out_zeros(lifter, other, choice, body))
        if not part and _whole(lifter, other) not in same:
            return NoMatch(f"experts without rows by %{other} are passed over, rows go by %{choice}", anchor)
    return None


def _whole(lifter: Lifter, choice: str, *more: str) -> str:
    """The choice that another is a view of."""
    name = choice.partition("#")[0]
    found = lifter.graph.behind(Ref(name), ("cast", "same", "reshape", "detach", "permute", *more))
    return found.name if isinstance(found, Ref) else name
