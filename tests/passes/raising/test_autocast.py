"""Casts of autocast as nodes: which operators get them, and which are not understood."""

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from moec.passes.raising.autocast import spell_casts
from moec.passes.raising.raise_graph import fake

BF16, F32 = torch.bfloat16, torch.float32


def traced(operators, **inputs):
    """A graph of `(target, operand names, dtype of the result)`, each result named after its target; fakes attached."""
    graph, held = fx.Graph(), {}
    mode = FakeTensorMode()
    with mode:
        for name, dtype in inputs.items():
            held[name] = graph.placeholder(name)
            held[name].meta["example_value"] = torch.empty(4, 4, dtype=dtype)
        for target, names, dtype in operators:
            node = graph.call_function(target, tuple(held[n] for n in names))
            node.meta["example_value"] = torch.empty(4, 4, dtype=dtype)
            held[node.name] = node
    graph.output(node)
    return fx.GraphModule({}, graph)


def casts(gm):
    return [(node.args[0].name, node.args[1]) for node in gm.graph.nodes if node.target == "to"]


def test_operands_of_a_product_are_cast_down():
    gm = traced([(torch.mm, ("x", "w"), BF16)], x=F32, w=F32)
    assert spell_casts(gm) == ""
    assert casts(gm) == [("x", BF16), ("w", BF16)]
    assert [fake(node).dtype for node in gm.graph.nodes if node.target == "to"] == [BF16, BF16]


def test_only_operands_in_another_dtype_are_cast():
    gm = traced([(torch.mm, ("x", "w"), BF16)], x=BF16, w=F32)
    assert spell_casts(gm) == ""
    assert casts(gm) == [("w", BF16)]


def test_operands_are_cast_up():
    gm = traced([(torch.softmax, ("x",), F32)], x=BF16)
    gm.graph.find_nodes(op="call_function", target=torch.softmax)[0].kwargs = {"dim": -1}
    assert spell_casts(gm) == ""
    assert casts(gm) == [("x", F32)]


def test_promotion_is_no_cast():
    gm = traced([(torch.mul, ("x", "w"), F32)], x=BF16, w=F32)
    assert spell_casts(gm) == ""
    assert casts(gm) == []


def test_a_double_is_left_alone():
    gm = traced([(torch.mm, ("x", "w"), torch.float64)], x=torch.float64, w=torch.float64)
    assert spell_casts(gm) == ""
    assert casts(gm) == []


def test_an_operator_that_no_cast_explains_is_named():
    gm = traced([(torch.mul, ("x", "w"), torch.float16)], x=F32, w=torch.float64)
    assert spell_casts(gm).startswith("mul at")
    assert casts(gm) == []
