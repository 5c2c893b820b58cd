"""Between an understood layer and its instruction: what kernels cannot run, and the words of a sum over slots."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch

from moec.ir import expr as ex
from moec.ir.dtypes import DTYPES
from moec.ir.graph import Graph, Instr, Ref, Type
from moec.ir.match import NoMatch
from moec.passes.canonical.rewriter import STORED
from moec.passes.dispatch.combine import Combined, chosen_of
from moec.passes.rows.body import NOTHING, BodyMatch
from moec.passes.rows.lift import same
from moec.passes.rows.pairs import Writer
from moec.passes.rows.say_experts import filled, site_attrs, vector
from moec.passes.rows.token_axes import as_pairs, each_token, shaped_like, slots_of
from moec.pipeline import Facts
from moec.target import kernel_devices


@dataclass(frozen=True)
class Found:
    """One group of experts, ready to be said: the instructions that replace its root."""

    root: str
    instrs: tuple[Instr, ...]


def idle_is_zero(body: BodyMatch) -> bool:
    """Whether a row with weight 0 gives 0."""
    return body.spec.weight_on == "output" or (not body.spec.bias_out and maps_zero_to_zero(body))


def _kept(graph: Graph, body: BodyMatch) -> list[str]:
    """The values of which an expert's parameters are views."""
    given = [name.removesuffix(NOTHING) for group in body.params for name in group]
    behind = (graph.behind(Ref(name), STORED) for name in given)
    return list(dict.fromkeys(held.name for held in behind if isinstance(held, Ref)))


def as_trained(graph: Graph, facts: Facts, body: BodyMatch) -> BodyMatch:
    """The body, its matrices cast before where they are trained: kernels that widen them have no gradient."""
    if body.spec.codes != "bf16" or facts.grad.isdisjoint(_kept(graph, body)):
        return body
    return replace(body, spec=replace(body.spec, codes=""), cast=body.spec.dtype)


def obstacle(graph: Graph, facts: Facts, body: BodyMatch) -> NoMatch | None:
    """Why kernels cannot run this layer although it is understood."""
    names = _kept(graph, body)
    for name in names:
        if name in facts.not_plain:
            return NoMatch(f"parameter %{name} is a {facts.not_plain[name]}, expected a plain dense tensor", name, 9)
        device, engine = facts.devices.get(name, "cpu"), facts.options.kernels
        if device not in kernel_devices(engine):
            where = " and ".join(map(repr, kernel_devices(engine)))
            return NoMatch(f"parameter %{name} is on device {device!r}, kernels={engine!r} is for {where}", name, 9)
    learned = [name for name in names if name in facts.grad]
    if body.spec.codes and learned:
        why = f"%{learned[0]} needs a gradient, and there is none of matrices kept as {body.spec.codes}"
        return NoMatch(why, learned[0], 9, hint="freeze it, or keep the experts in the dtype of the products")
    if body.cast and not learned and _few(graph.types[body.token], body.num_experts):
        why = f"a call casts the matrices of the few experts that it hits to {body.cast}, kernels would cast all"
        return NoMatch(why, names[0], 9, hint=f"keep the experts' parameters in {body.cast}")
    if facts.autocast:
        why = f"what autocast casts in {facts.autocast} is not known"
        return NoMatch(why, depth=9, hint="cast the model instead of using autocast")
    return None


def _few(tokens: Type, experts: sympy.Expr) -> bool:
    """Whether there are fewer tokens than experts, so that most experts are idle."""
    count = sympy.Mul(*tokens.shape[:-1])
    return bool(count.is_Integer and experts.is_Integer and count < experts)


def maps_zero_to_zero(body: BodyMatch) -> bool:
    zero = torch.zeros((), dtype=torch.float64)
    return not body.spec.bias_in and float(ex.evaluate(body.spec.phi, {"a": zero, "b": zero})) == 0.0


def stored(out: Writer, body: BodyMatch) -> tuple[tuple[str, ...], ...]:
    """The parameters as the op takes them: cast, and scales with an axis for each of the matrix's."""
    params = tuple(tuple(filled(out, name) for name in group) for group in body.params)
    plain = len(params) - len(body.scales)
    made: list[tuple[str, ...]] = []
    for group, names in zip(body.spec.param_groups, params[:plain], strict=False):
        if group.startswith("bias_"):
            made.append(tuple(vector(out, name, group, body) for name in names))
        else:
            made.append(tuple(out.cast(name, body.cast) for name in names) if body.cast else names)
    for group, shape in zip(params[plain:], body.scales, strict=True):
        wide = (out.type(group[0]).shape[0], *shape) if body.spec.stacked else shape
        made.append(tuple(out.cast(out.reshape(name, wide), "f32") for name in group))
    return tuple(made)


def other_shape(x: Type, to: Type, root: Instr) -> NoMatch:
    """What comes together is not one row of experts' outputs a token."""
    return NoMatch(f"tokens are {x}, their sum is {to}", root.results[0], 7)


def say_sum(
    graph: Graph, root: Instr, total: Combined, body: BodyMatch, prelude: tuple[Instr, ...], weights: str, choice: str
) -> Found | NoMatch:
    """The `experts` instruction, after `prelude`, and the addition to what the sum started from."""
    to = root.types[0]
    x = graph.types[body.token]
    tokens = x.rank >= 2 and to.rank >= 2 and same(sympy.Mul(*x.shape[:-1]), sympy.Mul(*to.shape[:-1]))
    if not tokens or to.shape[-1] != body.out:
        return other_shape(x, to, root)
    if x.dtype not in DTYPES or to.dtype not in DTYPES:
        return NoMatch(f"tokens are {x}, their sum is {to}, expected f32, bf16 or f16", root.results[0], 7)
    made = {name: kind for each in prelude for name, kind in zip(each.results, each.types, strict=True)}
    out = Writer(graph, root, list(prelude), made)
    pairs = as_pairs(out, weights, choice, slots_of(graph, total.rows.choice), x.dtype)
    if isinstance(pairs, NoMatch):
        return pairs.deeper(6)
    groups = tuple(tuple(Ref(name) for name in group) for group in stored(out, body))
    tokens_in_all = sympy.Mul(*x.shape[:-1])
    rows = out.reshape(body.token, (tokens_in_all, x.shape[-1])) if x.rank > 2 else body.token
    spread = each_token(out, pairs, x, rows)
    if isinstance(spread, NoMatch):
        return spread.deeper(6)
    args = (Ref(rows), *map(Ref, spread), tuple(ref for group in groups for ref in group))
    attrs = site_attrs(body, to.dtype, total.form)
    name = root.results[0]
    flat = to if to.rank == 2 else Type(to.dtype, (tokens_in_all, body.out))
    over = total.over if chosen_of(graph, total.rows.choice) != body.num_experts else ""
    kept = _kept_over(out, over, spread[1], flat, body.num_experts) if over else None
    steps = ["routed"] * (kept is not None) + ["rows"] * (to.rank > 2) + ["routed"] * bool(total.base)
    names = [*(f"{name}.{step}" for step in steps), name]
    said = [Instr((names[0],), "experts", args, (flat,), attrs, root.loc)]
    if kept is not None:
        served, before = kept
        given = (Ref(served), Ref(names[0]), Ref(before))
        said.append(Instr((names[1],), "where", given, (flat,), (), root.loc))
    if to.rank > 2:
        shaped = shaped_like(graph, body.token, to.shape)
        given = (Ref(names[len(said) - 1]), *([Ref(shaped)] if shaped else []))
        said.append(Instr((names[len(said)],), "reshape", given, (to,), (), root.loc))
    if total.base:
        said.append(Instr((name,), "add", (Ref(total.base), Ref(f"{name}.routed")), (to,), (), root.loc))
    return Found(name, (*out.instrs, *said))


def _kept_over(out: Writer, over: str, choice: str, rows: Type, experts: sympy.Expr) -> tuple[str, str]:
    """Which tokens' experts e[T, 1] there are, [T, 1], and what the others keep, as rows [T, H]."""
    mask = Type("bool", out.type(choice).shape)
    first, last = out.emit("ge", (Ref(choice), 0), mask), out.emit("lt", (Ref(choice), int(experts)), mask)
    served = out.emit("bitwise_and", (Ref(first), Ref(last)), mask)
    return served, out.cast(out.reshape(over, rows.shape), rows.dtype)
