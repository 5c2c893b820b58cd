"""Say how near each candidate that is not fused came: what held, what failed first, the value seen, what to change."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from moec.ir.graph import Graph, Instr
from moec.ir.match import NoMatch
from moec.passes.experts.find_experts import ROOTS, Found, find_any, lifter_of
from moec.passes.reports.banks import Bank
from moec.passes.reports.candidates import Candidate, candidates_of
from moec.passes.reports.places import place
from moec.pipeline import Facts, Miss
from moec.report import Check

BEFORE = (
    "rows reach their experts by index operations",
    "from the choice to the experts' first product use only index, gather, sort, one_hot, cumsum and masks",
)
BEHIND = (
    "each token sums its experts' rows",
    "put rows back with index_add or an index, sum them over a token's choices; move what stands here behind the sum",
)
STAGES: tuple[tuple[str, str], ...] = (
    BEHIND,
    (
        "an expert is matrices and pointwise functions",
        "keep normalisations, convolutions and values shared between tokens out of the experts, "
        "or apply them before the choice or behind the sum",
    ),
    ("every expert is visited", "let the loop run over all experts, or over those that have tokens"),
    (
        "each row has one chosen expert and one weight",
        "give experts and weights as two tensors [tokens, k] made by one top-k",
    ),
    (
        "kernels exist for it",
        "hold tokens and parameters as plain f32, bf16 or f16 tensors on the CPU",
    ),
)
"""The predicates of `find_experts`, in its order, and what to change where one fails."""


@dataclass(frozen=True)
class NearMiss:
    """A candidate that was not fused; `miss` is what the matcher said, if it came so far."""

    candidate: Candidate
    checks: tuple[Check, ...]
    miss: Miss

    @property
    def hint(self) -> str:
        """What to change."""
        return self.miss.why.hint


def near_misses(
    graph: Graph, facts: Facts, misses: Iterable[Miss], params: Collection[str] = ()
) -> tuple[tuple[Candidate, ...], tuple[NearMiss, ...]]:
    """All candidates, and the open ones with their reasons. A miss that belongs to none of them is no MoE layer's."""
    candidates = candidates_of(graph, params)
    best: dict[int, Miss] = {}
    for miss in misses:
        at = _owner(graph, candidates, miss.value)
        if at is None:
            continue
        if at not in best or (len(miss.why.held), miss.why.depth) > (len(best[at].why.held), best[at].why.depth):
            best[at] = miss
    near: list[NearMiss] = []
    for number, candidate in enumerate(candidates):
        if candidate.status == "open" or number in best:
            near.append(_near(graph, facts, candidate, best.get(number)))
    return candidates, tuple(near)


def _owner(graph: Graph, candidates: tuple[Candidate, ...], value: str) -> int | None:
    """The candidate whose rows come together in `value`: of those it depends on, the last to begin."""
    if value not in graph.position:
        return None
    behind = _behind(graph, value)
    owners = [
        (graph.position[bank.instrs[0]], number)
        for number, candidate in enumerate(candidates)
        for bank in candidate.banks
        if not bank.fused and not behind.isdisjoint(bank.instrs)
    ]
    return max(owners)[1] if owners else None


def _behind(graph: Graph, value: str) -> set[str]:
    pending, seen = [value], {value}
    while pending:
        made = graph.defs.get(pending.pop())
        if made is not None:
            new = [name for name in (*made.uses, *made.results) if name not in seen]
            seen.update(new)
            pending.extend(name for name in new if name not in made.results)
    return seen


def _near(graph: Graph, facts: Facts, candidate: Candidate, miss: Miss | None) -> NearMiss:
    """The ladder of one candidate, up to the first predicate that fails."""
    evidence = evidence_of(graph, candidate)
    held = [check for check, _ in evidence if check.held]
    failed = next(((check, hint) for check, hint in evidence if not check.held), None)
    if miss is None and failed is not None:
        check, hint = failed
        why = NoMatch(check.value, hint=hint)
        return NearMiss(candidate, (*held, check), Miss(candidate.root, check.location, why))
    why = miss.why if miss is not None else _ask(graph, facts, candidate)
    predicate, hint = _stage(graph, candidate, why)
    why = why if why.hint else replace(why, hint=hint)
    loc = place(graph, *filter(None, (why.at, miss.value if miss is not None else "")), *_standing_for(candidate))
    checks = (*held, *(Check(text, True) for text in why.held), Check(predicate, False, why.reason, loc))
    return NearMiss(candidate, checks, Miss(miss.value if miss is not None else candidate.root, loc, why))


def _stage(graph: Graph, candidate: Candidate, why: NoMatch) -> tuple[str, str]:
    """The predicate that failed: by how far the matcher came, at first by which side of the experts it stumbled on."""
    if why.held or why.at not in graph.position:
        return STAGES[min(len(why.held), len(STAGES) - 1)]
    products = [
        name for bank in candidate.banks for name in (bank.instrs if bank.kind != "loop" else _products(graph, bank))
    ]
    after = not _behind(graph, why.at).isdisjoint(products)
    before = any(why.at in _behind(graph, name) for name in products)
    if after and before:
        return STAGES[1]
    return BEHIND if after else BEFORE


def _products(graph: Graph, bank: Bank) -> tuple[str, ...]:
    """A loop's products: what reads its parameters."""
    names = [n for n in bank.instrs if n in graph.defs]
    taken = {n for n in names if graph.defs[n].word in ("take", "pick")}
    return tuple(n for n in names if not taken.isdisjoint(graph.defs[n].uses))


def _ask(graph: Graph, facts: Facts, candidate: Candidate) -> NoMatch:
    """The matcher's own words where its pass did not think the candidate worth a mention."""
    if candidate.combine is None or candidate.combine.word not in ROOTS:
        word = candidate.combine.word if candidate.combine is not None else "nothing"
        return NoMatch(f"`{word}` is not a sum over a token's experts", candidate.root)
    found = find_any(lifter_of(graph), candidate.combine, facts)
    return NoMatch("rewrite fuel is spent") if isinstance(found, Found) else found


def place_of(graph: Graph, candidate: Candidate) -> str:
    """`file:line` of the user's code for which a candidate stands."""
    return place(graph, *_standing_for(candidate))


def _standing_for(candidate: Candidate) -> tuple[str, ...]:
    """The values that stand for a candidate, the best first."""
    return candidate.root, candidate.last.results[0], *(bank.instrs[0] for bank in candidate.banks[:1])


def evidence_of(graph: Graph, candidate: Candidate) -> tuple[tuple[Check, str], ...]:
    """What can be seen of an MoE layer without understanding it; with each predicate what to change where it fails."""
    chosen, banks, combine = candidate.selections, candidate.banks, candidate.combine
    products = place(graph, *(bank.instrs[0] for bank in banks), candidate.root)
    choosing = place(graph, chosen[-1].results[0]) if chosen else products  # where a choice would have been used
    return (
        (
            Check("experts are chosen", bool(chosen), chosen_text(candidate), choosing),
            "a layer in which every expert counts for every token, only by weights, has nothing to leave out: "
            "it runs as it was written",
        ),
        (Check("experts have parameters of their own", bool(banks), banks_text(candidate), products), ""),
        (
            Check(
                "experts' rows come together",
                combine is not None,
                f"`{combine.word}`" if combine is not None else "no sum, index_add or scatter behind the experts",
                place_of(graph, candidate),
            ),
            "add the experts' rows to their tokens with index_add, or sum them over the axis of choices",
        ),
    )


def chosen_text(candidate: Candidate) -> str:
    """How experts are chosen: `top-2 of 8`."""
    if not candidate.selections:
        return "nothing is chosen: no top-k, sort, argmax or threshold meets these products"
    texts = dict.fromkeys(_choice_text(candidate, instr) for instr in candidate.selections)
    return ", ".join(list(texts)[:3])


def _choice_text(candidate: Candidate, instr: Instr) -> str:
    if instr.word == "topk":
        axis = instr.types[0].shape[int(str(instr.attr("dim")))] if instr.types[0].rank else 1
        source = candidate.types.get(instr.uses[0])
        count = source.shape[int(str(instr.attr("dim")))] if source is not None and source.rank else "?"
        return f"top-{axis} of {count}"
    return str(dict(instr.attrs).get("target", instr.word))


def banks_text(candidate: Candidate) -> str:
    """What the experts compute with: `8 experts, loop: f32[24, 16], f32[16, 24]`."""
    if not candidate.banks:
        return "no product has parameters that differ by choice"
    count = next((bank.experts for bank in candidate.banks if bank.experts), "")
    kinds = ", ".join(dict.fromkeys(bank.kind for bank in candidate.banks))
    shapes = ", ".join(list(dict.fromkeys(shape for bank in candidate.banks for shape in bank.params))[:4])
    return f"{f'{count} experts, ' if count else ''}{kinds}{f': {shapes}' if shapes else ''}"


def counts_of(candidate: Candidate) -> tuple[int, int]:
    """E and k where they can be seen, else 0."""
    experts = next((int(bank.experts) for bank in candidate.banks if bank.experts.isdigit()), 0)
    tops = [i.types[0].shape[int(str(i.attr("dim")))] for i in candidate.selections if i.word == "topk"]
    return experts, int(tops[-1]) if tops and tops[-1].is_Integer else 0


def chosen_values(candidate: Candidate) -> tuple[str, ...]:
    """The values that hold the chosen experts: the last top-k over experts, or every argmax over them."""
    experts, _ = counts_of(candidate)
    tops: list[str] = []
    single: list[str] = []
    for instr in candidate.selections:
        source = candidate.types[instr.uses[0]]
        if not experts or not source.rank or source.shape[-1] != experts:
            continue
        if instr.word == "topk" and instr.attr("dim") == source.rank - 1:
            tops.append(instr.results[1])
        elif instr.types[-1].dtype == "i64" and instr.types[-1].rank == source.rank - 1:
            single.append(instr.results[-1])
    return tuple(tops[-1:]) or tuple(single)
