"""The vocabulary: which raiser says which FX node. One visible table; what is not in it stays opaque."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from moec.ir.graph import Arg, Ref
from moec.passes.raising import updates, word_activations, word_contract, word_masks, word_scatter, word_views, words
from moec.passes.raising.heads import hold_heads
from moec.passes.raising.raise_graph import Builder, Raised, Raiser, fake, opaque, raise_graph, type_of_fake
from moec.passes.raising.transforms import transformed
from moec.passes.raising.words import BINARY, UNARY, key_of


def _each(names: str, raiser: Raiser) -> dict[str, Raiser]:
    return dict.fromkeys(names.split(), raiser)


TABLE: Mapping[str, Raiser] = {
    **dict.fromkeys(UNARY, words.raise_unary),
    **dict.fromkeys(BINARY, words.raise_binary),
    **_each("clamp clamp_min clamp_max", words.raise_clamp),
    **_each("logical_not", words.raise_logical_not),
    **_each("square", word_activations.raise_square),
    **_each("mish", word_activations.raise_mish),
    **_each("hardswish", word_activations.raise_hardswish),
    **_each("relu6", word_activations.raise_relu6),
    **_each("glu", word_activations.raise_glu),
    **_each("normalize", word_activations.raise_normalize),
    **_each("leaky_relu", word_activations.raise_leaky_relu),
    **_each("to type type_as float half bfloat16 double int long bool _to_copy", words.raise_cast),
    **_each("clone contiguous", words.raise_same),
    **_each("detach", words.raise_detach),
    **_each("softmax", words.raise_softmax),
    **_each("sum mean amax amin any all prod", words.raise_reduce),
    **_each("max", words.raise_max),
    **_each("argmax", words.raise_argmax),
    **_each("topk", words.raise_topk),
    **_each("sort argsort", words.raise_sort),
    **_each("unique", words.raise_unique),
    **_each("zeros ones full empty zeros_like ones_like full_like empty_like", words.raise_full),
    **_each("new_zeros new_ones new_full new_empty", words.raise_full),
    **_each("arange", words.raise_arange),
    **_each("cumsum", words.raise_cumsum),
    **_each("searchsorted", words.raise_searchsorted),
    **_each("bincount histc", words.raise_counts),
    **_each("masked_fill", words.raise_masked_fill),
    **_each("size numel dim", words.raise_size),
    **_each("_set_grad_enabled _enter_autocast _exit_autocast", words.raise_effect),
    **_each(
        "_assert _assert_async _assert_scalar _check sym_constrain_range sym_constrain_range_for_size",
        words.raise_assert,
    ),
    **_each("rand randn rand_like randn_like randint bernoulli multinomial normal", words.raise_random),
    **_each("uniform exponential normal gumbel_softmax", words.raise_random),
    **_each("dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d", words.raise_dropout),
    **_each("view reshape flatten unflatten squeeze unsqueeze view_as reshape_as", word_views.raise_reshape),
    **_each("permute transpose t mT", word_views.raise_permute),
    **_each("movedim moveaxis", word_views.raise_movedim),
    **_each("chunk split unbind tensor_split split_with_sizes", word_views.raise_chunk),
    **_each("narrow select", word_views.raise_narrow),
    **_each("expand expand_as broadcast_to", word_views.raise_expand),
    **_each("repeat tile", word_views.raise_repeat),
    **_each("repeat_interleave", word_views.raise_repeat_interleave),
    **_each("cat stack", word_views.raise_cat),
    **_each("where nonzero", word_views.raise_where),
    **_each("masked_select", word_masks.raise_masked_select),
    **_each("getitem", word_views.raise_index),
    **_each("index_select", word_views.raise_index_select),
    **_each("embedding", word_views.raise_embedding),
    **_each("gather take_along_dim", word_scatter.raise_gather),
    **_each("scatter scatter_add index_add index_copy", word_scatter.raise_scatter),
    **_each("index_put", word_views.raise_index_put),
    **_each("scatter_reduce", word_scatter.raise_scatter_reduce),
    **_each("one_hot", word_views.raise_one_hot),
    **_each("linear", word_contract.raise_linear),
    **_each("matmul mm bmm", word_contract.raise_matmul),
    **_each("baddbmm addmm", word_contract.raise_baddbmm),
    **_each("einsum", word_contract.raise_einsum),
    **_each("tensordot", word_contract.raise_tensordot),
    **_each("grouped_mm _grouped_mm", word_contract.raise_grouped),
}


def raiser_of(node: fx.Node) -> Raiser | None:
    """How this node is said; an in-place spelling is its functional one followed by an update."""
    key = key_of(node)
    if node.kwargs.get("out") is not None:
        return updates.writes_out
    if not node.args:  # operands given by keyword alone are rare, and stay opaque
        return updates.writes_keyword if updates.is_update(node, key) else None
    if key == "getattr":
        return _raise_attribute
    if key == "setitem":
        return _in_place(word_views.raise_setitem)
    if key.startswith("moec."):
        return _raise_marker
    if updates.has_inplace_flag(node):
        return _in_place(_without_flag(TABLE.get(key, _opaque)))
    if key in TABLE:
        return TABLE[key]
    if updates.sets_to_itself(node, key):
        return words.raise_same
    if updates.is_update(node, key):
        return _in_place(TABLE.get(key.removesuffix("_"), _opaque)) if _one(node) else updates.writes_all
    if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return _raise_custom
    return None


def _one(node: fx.Node) -> bool:
    return isinstance(node.args[0], fx.Node)


def _opaque(build: Builder, node: fx.Node) -> Arg | None:
    return opaque(build, node)


def _without_flag(raiser: Raiser) -> Raiser:
    def say(build: Builder, node: fx.Node) -> Arg | None:
        args = build.value(node.args[0])
        return build.emit(key_of(node), (args,), type_of_fake(fake(node)))

    return say if raiser is words.raise_unary else raiser


def _in_place(raiser: Raiser) -> Raiser:
    """The update of the first argument's storage by the functional meaning."""

    def say(build: Builder, node: fx.Node) -> Arg | None:
        said = raiser(build, node)
        said = opaque(build, node) if said is None else said
        base = node.args[0]
        assert isinstance(base, fx.Node)
        if isinstance(said, Ref):
            said = _with_own_name(build, node, said)
            build.mutate(base, said)
        return said

    return say


def _with_own_name(build: Builder, node: fx.Node, said: Ref) -> Ref:
    """An update always makes a value of its own, in the base's dtype."""
    base = type_of_fake(fake(node.args[0])) if isinstance(node.args[0], fx.Node) else build.type_of(said)
    if build.type_of(said).dtype != base.dtype:
        return build.emit("cast", (said,), base, dtype=base.dtype)
    return said if said.name.startswith(node.name) else build.emit("same", (said,), base)


def _raise_attribute(build: Builder, node: fx.Node) -> Arg | None:
    name = node.args[1]
    if name in ("T", "mT"):
        return word_views.raise_permute(build, node)
    if isinstance(fake(node), torch.Tensor):  # x.real, x.data, x.grad
        return None
    return words.raise_size(build, node)


def _raise_marker(build: Builder, node: fx.Node) -> Arg | None:
    """moec's own ops (the marks of rolled loops) are words already."""
    args = tuple(build.value(a) for a in (*node.args, *node.kwargs.values()))
    if key_of(node) == "moec.yield_":
        running = isinstance(node.args[0], fx.Node) and key_of(node.args[0]) == "moec.carry_int"
        build.emit("turn" if running else "end", args if running else (args[2],), type_of_fake(fake(node)))
        return args[1]
    if key_of(node) in ("moec.anchor", "moec.anchor_range"):
        item = build.emit(key_of(node).removeprefix("moec."), args, type_of_fake(fake(node)))
        hold_heads(build, node, item)
        return item
    return build.emit(key_of(node).removeprefix("moec."), args, type_of_fake(fake(node)))


def _raise_custom(build: Builder, node: fx.Node) -> Arg | None:
    """A custom operator: a grouped product if it behaves as one; an update if its schema says so."""
    overload = word_contract.overload_of(node)
    if overload is None:
        return None
    if not overload._schema.is_mutable:
        return word_contract.raise_custom_grouped(build, node)
    said = opaque(build, node, "effect")
    for base in updates.written(node, overload):
        build.mutate(base, build.emit("changed", (build.value(base),), type_of_fake(fake(base))))
    return said


def raise_fx(gm: fx.GraphModule) -> Raised:
    """Dynamo's graph in canonical words; opaque inside transforms; all opaque where a tensor changes its shape."""
    reshaped = any(updates.reshapes(node, key_of(node)) for node in gm.graph.nodes if node.op.startswith("call"))
    return raise_graph(gm, (lambda node: None) if reshaped else raiser_of, transformed(gm))
