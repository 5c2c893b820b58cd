"""Say a site's instruction in the words of the IR, for people and reports."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from moec.ir import site as ir
from moec.ir.formulas import size_of
from moec.ir.graph import Graph, Instr, Ref, normal_dim
from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec
from moec.passes.routers.find_routers import describe


def site_of(graph: Graph, instr: Instr, name: str, training: bool) -> ir.Site:
    """The IR of one `experts` or `moe` instruction."""
    attrs = dict(instr.attrs)
    spec = KernelSpec.parse(str(attrs["spec"]))
    x, y = instr.uses[0], instr.results[0]
    x_type = graph.types[x]
    experts = _dim(attrs["experts"])
    k = sympy.Integer(int(str(attrs["k"]))) if instr.word == "moe" else graph.types[instr.uses[2]].shape[1]
    body = ir.Body(
        kind=kind_of(spec.experts),
        activation=spec.experts.activation,
        width=_dim(attrs["width"]),
        gate=spec.experts.gate,
        layout_in=spec.experts.layout_in,
        layout_out=spec.experts.layout_out,
        params=params_of(instr, spec),
        dtype=spec.experts.dtype,
    )
    score, select, weight = _router(instr, k, x_type.shape[0])
    shared = None
    if "shared" in attrs:
        shared = ir.SharedExpert(str(attrs["shared"]), _dim(attrs["shared_width"]), bool(attrs["shared_gated"]))
    return ir.Site(
        name=name,
        x=x,
        y=y,
        x_type=x_type,
        y_type=instr.types[0],
        num_experts=experts,
        score=score,
        select=select,
        weight=weight,
        dispatch=ir.Dispatch(rows=k * x_type.shape[0]),
        body=body,
        combine=ir.Combine(spec.experts.weight_on, "f32", spec.y_dtype, ("add shared",) if shared else ()),
        capacity=_capacity(attrs),
        shared=shared,
        plan=ir.Plan(fuse_router=instr.word == "moe", training=training),
        form=str(attrs["form"]),
        loc=instr.loc,
    )


def _capacity(attrs: Mapping[str, object]) -> ir.Capacity | None:
    if "capacity" not in attrs:
        return None
    order, drop = str(attrs.get("order", "position")), str(attrs.get("drop", "zero"))
    return ir.Capacity(size_of(attrs["capacity"]), order, drop, size_of(attrs.get("queues", 1)))


def _dim(value: object) -> sympy.Expr:
    return sympy.Integer(value) if isinstance(value, int) else normal_dim(sympy.parse_expr(str(value)))


def params_of(instr: Instr, spec: KernelSpec) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The parameters by role, as the kernel takes them."""
    flat = instr.args[-1]
    assert isinstance(flat, tuple)
    names = [ref.name for ref in flat if isinstance(ref, Ref)]
    roles = spec.experts.param_groups
    size = len(names) // len(roles)
    return tuple((role, tuple(names[i * size : (i + 1) * size])) for i, role in enumerate(roles))


def _router(instr: Instr, k: sympy.Expr, tokens: sympy.Expr) -> tuple[ir.Score, ir.Select, ir.Weight]:
    router, names = router_of(instr)
    if router is None:
        return ir.Score("opaque"), ir.Select("given", k, k * tokens), ir.Weight("given")
    bias = names[1] if router.bias else ""
    selection = names[-1] if router.selection_bias else ""
    score = ir.Score(router.score_text, names[0], bias, router.compute, router.score_dtype)
    select = ir.Select(
        "topk",
        k,
        k * tokens,
        bias=selection,
        groups=router.groups,
        topk_group=router.topk_group,
        group_score=router.group_score,
        masked_value=router.masked_value,
        sorted=router.sorted,
    )
    weight = ir.Weight(
        router.weight_from,
        router.softmax_over_k,
        router.renormalize,
        router.eps,
        router.clamp_min,
        router.scale,
        router.weight_dtype,
    )
    return score, select, weight


def router_of(instr: Instr) -> tuple[RouterSpec | None, list[str]]:
    """The router of a site, fused or understood but apart, and its parameters; None where it is the model's own."""
    attrs = dict(instr.attrs)
    if instr.word == "moe" and isinstance(instr.args[1], tuple):
        return KernelSpec.parse(str(attrs["spec"])).router, [r.name for r in instr.args[1] if isinstance(r, Ref)]
    params = attrs.get("router_params")
    if "router" not in attrs or not isinstance(params, tuple):
        return None, []
    return KernelSpec.parse(str(attrs["router"])).router, [str(p) for p in params]


def router_text(graph: Graph, instr: Instr) -> str:
    """The router in a few words."""
    router, _ = router_of(instr)
    if router is None:
        return "the model's own (in the graph)"
    if instr.word == "moe":
        return describe(router, int(str(instr.attr("k"))))
    return f"{describe(router, int(graph.types[instr.uses[2]].shape[1]))} (in the graph)"


_NAMES = {"mlp": "mlp", "gated": "gated mlp", "linear": "linear", "glu": "gated linear"}


def kind_of(spec: ExpertsSpec) -> str:
    """What an expert does with a row, in the IR's words."""
    if spec.out:
        return "mlp" if spec.gate == "none" else "gated"
    return "linear" if spec.gate == "none" else "glu"


def experts_text(graph: Graph, instr: Instr) -> str:
    """The experts in a few words."""
    attrs = dict(instr.attrs)
    spec = KernelSpec.parse(str(attrs["spec"])).experts
    parts = [
        f"{attrs['experts']} × {_NAMES[kind_of(spec)]}",
        spec.activation,
        f"F={attrs['width']}{_output(graph, instr)}" if spec.out else f"O={attrs['width']}",
        spec.dtype,
    ]
    if spec.bias_in or spec.bias_out:
        parts.append("biases")
    if not spec.stacked:
        parts.append("separate tensors")
    if "shared" in attrs:
        parts.append(f"shared expert F={attrs['shared_width']}")
    return ", ".join(parts)


def _output(graph: Graph, instr: Instr) -> str:
    """The width of the output where it is another than x's."""
    wide = instr.types[0].shape[-1]
    return "" if wide == graph.types[instr.uses[0]].shape[-1] else f" O={wide}"
