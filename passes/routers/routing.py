"""Read a router off the values it ends in: the combine weights w[T, k] and the chosen experts e[T, k]."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moec.ir import expr as ex
from moec.ir.dtypes import DTYPES
from moec.ir.graph import Arg, Graph, Instr, Ref
from moec.ir.match import NoMatch
from moec.ir.spec import RouterSpec
from moec.passes.routers.scores import Score, linear, read_score, read_step
from moec.passes.rows.lift import FLOATS


@dataclass(frozen=True)
class RouterMatch:
    """A router understood: `params` are W[E, H], then its bias and the selection bias where it has them."""

    spec: RouterSpec
    k: int
    x: str
    params: tuple[str, ...]
    logits: str


@dataclass(frozen=True)
class _Weights:
    """The steps from a chosen score to w, and the chosen score itself; `after`: what is computed of chosen logits."""

    spec: RouterSpec
    chosen: str
    after: Score | None = None


def _def(graph: Graph, arg: Arg) -> Instr | None:
    return graph.defs.get(arg.name) if isinstance(arg, Ref) else None


def uncast(graph: Graph, name: str) -> str:
    """The value behind copies and casts between floats, or between whole numbers and masks."""
    made = graph.defs.get(name)
    while made is not None and (made.word == "same" or (made.word == "cast" and _keeps(graph, made))):
        name = made.uses[0]
        made = graph.defs.get(name)
    return name


def _keeps(graph: Graph, cast: Instr) -> bool:
    """Whether a cast keeps numbers up to rounding: floats become floats, and what is whole stays as it is."""
    return cast.types[0].dtype in FLOATS or graph.types[cast.uses[0]].dtype not in FLOATS


def match_router(graph: Graph, weights: str, choice: str) -> RouterMatch | NoMatch:
    """The router that made `weights` and `choice`."""
    made = graph.defs.get(choice)
    if made is None or made.word != "topk" or choice != made.results[1]:
        return NoMatch("experts are not chosen by top-k", choice, hint="the router stays as it is; experts are fused")
    k = made.attr("k")
    if not made.attr("largest") or made.attr("dim") != 1 or not isinstance(k, int):
        return NoMatch("experts are not the k largest along the expert axis", choice)
    steps = _weight_steps(
        graph, weights, RouterSpec(sorted=bool(made.attr("sorted")), weight_dtype=_dtype(graph, weights))
    )
    if isinstance(steps, NoMatch):
        return steps
    chosen = _chosen_from(graph, steps, made)
    if isinstance(chosen, NoMatch):
        return chosen
    spec, score = chosen
    return _selection(graph, spec, made.uses[0], score, k)


def _dtype(graph: Graph, name: str) -> str:
    return graph.types[name].dtype


def _weight_steps(graph: Graph, name: str, spec: RouterSpec) -> _Weights | NoMatch:
    """Undo scale, renormalisation and softmax over the chosen."""
    name = uncast(graph, name)
    made = graph.defs.get(name)
    if made is not None and made.word in ("mul", "div") and isinstance(made.args[1], int | float):
        if spec.renormalize or spec.softmax_over_k:
            return NoMatch("weights are scaled before they are normalised", name)
        factor = float(made.args[1]) if made.word == "mul" else 1.0 / float(made.args[1])
        return _weight_steps(graph, made.uses[0], replace(spec, scale=spec.scale * factor))
    if made is not None and made.word == "div":
        normal = _renormalization(graph, made)
        if isinstance(normal, NoMatch) or spec.renormalize:
            return normal if isinstance(normal, NoMatch) else NoMatch("weights are renormalised twice", name)
        source, eps, least = normal
        return _weight_steps(graph, source, replace(spec, renormalize=True, eps=eps, clamp_min=least))
    if made is not None and made.word == "softmax" and made.attr("dim") == 1 and not spec.softmax_over_k:
        source = uncast(graph, made.uses[0])
        behind = graph.defs.get(source)
        if behind is not None and behind.word in ("topk", "gather"):
            return _weight_steps(graph, source, replace(spec, softmax_over_k=True))
    if not spec.softmax_over_k and made is not None and made.word not in ("topk", "gather"):
        return _after_choice(graph, name, spec)
    return _Weights(spec, name)


def _after_choice(graph: Graph, name: str, spec: RouterSpec) -> _Weights:
    """Chosen values that a pointwise function was applied to, where they are top-k's own."""
    below = graph.defs[name]
    while below.word not in ("topk", "gather"):
        inner = next((graph.defs[u] for u in below.uses if u in graph.defs), None)
        if inner is None or graph.types[below.uses[0]].shape != graph.types[name].shape:
            return _Weights(spec, name)
        below = inner
    after = read_step(graph, name, below.results[0]) if below.word == "topk" else None
    return _Weights(spec, name) if after is None else _Weights(spec, below.results[0], after)


def _renormalization(graph: Graph, made: Instr) -> tuple[str, float, float] | NoMatch:
    """v / (v.sum(-1, keepdim) + eps), the sum perhaps clamped from below: v, eps, that bound."""
    if len(made.uses) != 2:
        return NoMatch("weights are divided by something else than their sum", made.results[0])
    top, total = made.uses
    eps = least = 0.0
    below = graph.defs.get(uncast(graph, total))
    while below is not None and below.word in ("add", "clamp_min", "maximum"):
        number = next((a for a in below.args if isinstance(a, int | float)), None)
        if number is None or len(below.uses) != 1:
            return NoMatch("weights are divided by something else than their sum", made.results[0])
        if below.word == "add" and least:
            eps, least = eps + number, least
        elif eps:
            return NoMatch("the weights' sum is bounded before a number is added to it", made.results[0])
        else:
            eps, least = (number, least) if below.word == "add" else (eps, float(number))
        below = graph.defs.get(uncast(graph, below.uses[0]))
    if below is None or below.word != "reduce_sum" or below.attr("dims") != (1,) or not below.attr("keepdim"):
        return NoMatch("weights are divided by something else than their sum", made.results[0])
    if uncast(graph, below.uses[0]) != uncast(graph, top):
        return NoMatch("weights are divided by the sum of something else", made.results[0])
    return top, eps, least


def _chosen_from(graph: Graph, steps: _Weights, topk: Instr) -> tuple[RouterSpec, str] | NoMatch:
    """Where the chosen score comes from: top-k's own values, or a gather of scores at the chosen experts."""
    made = graph.defs.get(steps.chosen)
    if made is not None and made.word == "topk" and made.results == topk.results and steps.chosen == topk.results[0]:
        if steps.after is not None:
            dtype = _dtype(graph, topk.results[0])
            return replace(_scored(steps.spec, steps.after, dtype), choose_by="logits"), topk.uses[0]
        return replace(steps.spec, weight_from="choice"), ""
    if made is None or made.word != "gather" or made.attr("dim") != 1 or uncast(graph, made.uses[1]) != topk.results[1]:
        return NoMatch("weights are not the scores of the chosen experts", steps.chosen)
    score = uncast(graph, made.uses[0])
    inner = graph.defs.get(score)
    if inner is not None and inner.word == "sigmoid":
        spread = graph.defs.get(uncast(graph, inner.uses[0]))
        if spread is not None and spread.word == "scatter" and spread.uses[1:] == (topk.results[1], topk.results[0]):
            spec = replace(steps.spec, score="sigmoid(logits)", score_dtype=_dtype(graph, score))
            return replace(spec, choose_by="logits"), topk.uses[0]
    return steps.spec, made.uses[0]


def _selection(graph: Graph, spec: RouterSpec, choice: str, score: str, k: int) -> RouterMatch | NoMatch:
    """Undo group limits and the selection bias; then the score function and the logits."""
    grouped = _groups(graph, choice, spec)
    if isinstance(grouped, NoMatch):
        return grouped
    spec, choice = grouped
    made = graph.defs.get(choice)
    bias = ""
    # What weights are made of themselves is not shifted for the choice alone.
    alone = score and spec.choose_by != "logits" and uncast(graph, score) != uncast(graph, choice)
    if made is not None and made.word == "add" and len(made.uses) == 2 and alone:
        ranks = [len([d for d in graph.types[u].shape if d != 1]) for u in made.uses]
        if sorted(ranks) == [1, 2]:
            bias = made.uses[ranks.index(1)]
            if graph.types[bias].shape[-1] != made.types[0].shape[1]:
                return NoMatch(f"scores are shifted by {graph.types[bias]}, expected one number an expert", bias)
            choice = made.uses[ranks.index(2)]
            spec = replace(spec, selection_bias=True)
    by = read_score(graph, choice)
    if isinstance(by, NoMatch):
        return by
    if spec.choose_by == "logits":  # what is computed of chosen logits is known already
        matched = by.score == ex.Var("logits")
        return _linear(graph, spec, by, bias, k) if matched else NoMatch("a score function of a score", choice)
    if not score or uncast(graph, score) == uncast(graph, choice):
        return _linear(graph, _scored(spec, by, _dtype(graph, choice)), by, bias, k)
    of = read_score(graph, score)
    if isinstance(of, Score) and by.score == ex.Var("logits") and by.logits == of.logits:
        spec = replace(_scored(spec, of, _dtype(graph, score)), choose_by="logits")
        return _linear(graph, spec, by, bias, k)
    return NoMatch("experts are chosen by another score than their weights come from", choice)


def _scored(spec: RouterSpec, found: Score, dtype: str) -> RouterSpec:
    """`spec` with a score function whose result is `dtype`."""
    found = found.rounded_at_last(dtype)
    return replace(spec, score=str(found.score), softmax_of=str(found.softmax_of), score_dtype=dtype)


def _groups(graph: Graph, choice: str, spec: RouterSpec) -> tuple[RouterSpec, str] | NoMatch:
    """masked_fill(c, ~mask, v), mask = the topk_group best of `groups` groups of c."""
    made = graph.defs.get(choice)
    if made is None or made.word not in ("masked_fill", "where"):
        return spec, choice
    if made.word == "masked_fill":
        source, mask, value = made.args
        flipped = _def(graph, mask)
        if flipped is None or flipped.word != "invert":
            return NoMatch("scores are masked by something else than chosen groups", choice)
        mask = flipped.args[0]
    else:
        mask, source, value = made.args
    if not isinstance(source, Ref) or not isinstance(mask, Ref) or not isinstance(value, int | float):
        return NoMatch("scores are masked by something else than a number", choice)
    name = mask.name
    made = graph.defs.get(_mask(graph, name))
    while made is not None and made.word in ("reshape", "expand", "cast", "repeat_interleave", "gt", "ne"):
        wide, narrow = made.types[0].shape, graph.types[made.uses[0]].shape
        if made.word == "expand" and (len(wide) != 3 or wide[:2] != narrow[:2]):
            return NoMatch("a group's experts do not stand side by side", choice)
        if made.word in ("gt", "ne") and made.args[1] not in (0, False):
            return NoMatch(f"a group mask is compared with {made.args[1]}, expected 0", choice)
        if made.word == "repeat_interleave" and made.attr("dim") != 1:
            return NoMatch("a group mask is repeated along another axis than groups", choice)
        made = graph.defs.get(_mask(graph, made.uses[0]))
    if made is None or made.word != "scatter" or made.attr("dim") != 1 or made.args[2] not in (1, 1.0, True):
        return NoMatch("scores are masked by something else than chosen groups", choice)
    base = graph.defs.get(made.uses[0])
    if base is None or base.word != "full" or base.attr("value") != 0.0:
        return NoMatch("scores are masked by something else than chosen groups", choice)
    top = graph.defs.get(made.uses[1])
    if top is None or not _largest(top, 1) or made.uses[1] != top.results[1]:
        return NoMatch("groups are not chosen by top-k", choice)
    return _group_scores(graph, replace(spec, masked_value=float(value)), source.name, top)


def _mask(graph: Graph, name: str) -> str:
    """The value behind casts and copies of a mask, which is 0 and 1 in any dtype."""
    behind = graph.behind(Ref(name), ("cast", "same"))
    assert isinstance(behind, Ref)
    return behind.name


def _largest(instr: Instr, dim: int) -> bool:
    return instr.word == "topk" and instr.attr("largest") is True and instr.attr("dim") == dim


def _best(instr: Instr) -> bool:
    """A group's best score: the maximum over axis 2."""
    if instr.word == "reduce_amax":
        return instr.attr("dims") == (2,) and not instr.attr("keepdim")
    return instr.word == "max" and instr.attr("dim") == 2 and not instr.attr("keepdim")


def _group_scores(graph: Graph, spec: RouterSpec, source: str, top: Instr) -> tuple[RouterSpec, str] | NoMatch:
    """A group's score: the sum of its two best, or its best."""
    scores = graph.defs.get(top.uses[0])
    kind = ""
    if scores is not None and scores.word == "reduce_sum" and scores.attr("dims") == (2,):
        best = graph.defs.get(scores.uses[0])
        if best is not None and _largest(best, 2) and best.attr("k") == 2 and scores.uses[0] == best.results[0]:
            kind, scores = "top2_sum", best
    elif scores is not None and _best(scores) and top.uses[0] == scores.results[0]:
        kind = "max"
    split = graph.defs.get(scores.uses[0]) if scores is not None and kind else None
    if split is None or split.word != "reshape" or uncast(graph, split.uses[0]) != uncast(graph, source):
        return NoMatch("a group's score is neither its best nor the sum of its two best", source)
    groups, chosen = split.types[0].shape[1], top.attr("k")
    if not groups.is_Integer or not isinstance(chosen, int):
        return NoMatch(f"the number of groups {groups} is not a number", source)
    return replace(spec, groups=int(groups), topk_group=chosen, group_score=kind), source


def _linear(graph: Graph, spec: RouterSpec, found: Score, selection_bias: str, k: int) -> RouterMatch | NoMatch:
    """The map x·Wᵀ + b that makes the logits."""
    made = linear(graph, found.logits)
    assert made is not None
    product, bias = made
    x, weight = product.uses
    spec = replace(spec, compute=product.types[0].dtype, bias=bool(bias))
    params = tuple(filter(None, (uncast(graph, weight), bias and uncast(graph, bias), selection_bias)))
    if not {spec.compute, spec.score_dtype, spec.weight_dtype} <= set(DTYPES):
        return NoMatch(f"scores are computed in {spec.compute}, {spec.score_dtype}, {spec.weight_dtype}", found.logits)
    if params[0] in graph.defs:
        return NoMatch("the router's matrix is computed, not a parameter", weight)
    return RouterMatch(spec, k, uncast(graph, x), params, found.logits)
