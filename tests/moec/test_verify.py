"""Verification: what a graph or a site may not be, what it may, how it is said, and the observers."""

import time
from dataclasses import replace

import pytest
import sympy

from moec.errors import VerifyError
from moec.ir import site as ir
from moec.ir.dims import symbol
from moec.ir.graph import Graph, Instr, Ref, Type, sweep
from moec.ir.text import dump, parse
from moec.ir.word_checks import CHECKS, differ
from moec.pipeline import Facts, Outcome, run_pipeline
from moec.report import PassRecord
from moec.verify import recording, verify, verify_site, verifying

INPUTS = (
    "%x: f32[T, 64], %w: f32[8, 64], %i: i64[T, 2], %e: f32[8, 64, 32], %off: i32[8], %c: f32[5, T, 1], "
    "%m: bool[T], %n: any"
)


def graph(*lines, outputs=""):
    body = "\n".join(f"  {line}" for line in lines)
    return parse(f"graph({INPUTS}) {{\n{body}\n  return {outputs}\n}}")


GOOD = [
    '%s = contract(%x, %w) eq="ab,cb->ac" : f32[T, 8]',
    '%s = contract(%c, %x) eq="abc,bd->acd" : f32[5, 1, 64]',
    '%s = contract(%n, %w) eq="ab,cb->ac" : f32[3, 3]',
    "%a, %b = topk(%x) k=2 dim=1 : f32[T, 2], i64[T, 2]",
    "%a, %b = topk(%x) k=2 dim=-1 largest=True : f32[T, 2], i64[T, 2]",
    "%a, %b = topk(%x) k=2 dim=0 : f32[2, 64], i64[2, 64]",
    "%a, %b = sort(%i) dim=0 : i64[T, 2], i64[T, 2]",
    "%a = softmax(%x) dim=1 : f32[T, 64]",
    "%a = cumsum(%i) dim=0 : i64[T, 2]",
    "%a = reduce_sum(%x) dims=[1] keepdim=True : f32[T, 1]",
    "%a = reduce_sum(%x) dims=[-1] keepdim=False : f32[T]",
    "%a = reduce_amax(%x) dims=[0, 1] : f32[]",
    "%a = reduce_any(%m) dims=[0] : bool[]",
    "%a = index(%x, %i) dim=0 : f32[T, 2, 64]",
    "%a = index(%e, %i, %i) dim=0 : f32[T, 2, 32]",
    "%a = index(%e, %i) dim=2 : f32[8, 64, T, 2]",
    "%a = index(%x, %m) dim=0 : f32[u0, 64]",
    "%a = gather(%x, %i) dim=1 : f32[T, 2]",
    "%a = scatter(%x, %i, 1.0) dim=1 : f32[T, 64]",
    "%a = index_add(%x, %off, %w) dim=0 : f32[T, 64]",
    "%a = index_put(%x, %w, %i) dim=0 accumulate=True : f32[T, 64]",
    "%a = one_hot(%i) classes=8 : i64[T, 2, 8]",
    "%a, %b = where_indices(%i) : i64[u0], i64[u0]",
    "%a = reshape(%x) : f32[64*T]",
    "%a = reshape(%x) : f32[2*T, 32]",
    "%a = reshape(%x) : f32[s1, s2]",
    "%a = permute(%e) dims=[0, 2, 1] : f32[8, 32, 64]",
    "%a = slice(%x) dim=1 start=0 stop=64 step=2 : f32[T, 32]",
    "%a = slice(%x) dim=0 start=1 stop=9 step=1 : f32[u0, 64]",
    "%a = expand(%c) : f32[5, T, 64]",
    "%a = expand(%x) : f32[3, T, 64]",
    "%a = cat([%x, %w]) dim=0 : f32[T + 8, 64]",
    "%a = cat([%x, %x]) dim=-1 : f32[T, 128]",
    '%a = cast(%x) dtype="bf16" : bf16[T, 64]',
    "%a = arange() : i64[T]",
    "%a = counts(%off) bins=8 : i64[8]",
    "%a = grouped(%x, %e, %off) : f32[T, 32]",
    "%a = mul(%x, %c) : f32[5, T, 64]",
    "%a = add(%x, 1.0) : f32[T, 64]",
    "%a = add(%n, %n) : any",
    "%a = clamp_min(%x, 0.0) : f32[T, 64]",
    "%a = full() value=0.0 : f32[T, 3]",
    '%a = opaque([%x, [%w]], "mode") target="mystery" : any',
    "%a, %b, %c2 = word_of_tomorrow(%x) : f32[1], any, i64[T]",
    'effect() target="_set_grad_enabled"',
]


@pytest.mark.parametrize("line", GOOD)
def test_valid_instructions(line):
    verify(graph(line))


BAD = [
    ('%s = contract(%x, %w) eq="ab,cb->ac" : f32[T, 9]', r"its result is f32\[T, 9\], expected the shape \[T, 8\]"),
    ('%s = contract(%x, %w) eq="ab,bc->ac" : f32[T, 64]', "axis 'b' of 'ab,bc->ac' is 64 and 8"),
    ('%s = contract(%x, %w) eq="abd,cb->ac" : f32[T, 8]', "has 2 axes, 'abd' in 'abd,cb->ac' says 3"),
    ('%s = contract(%x) eq="ab,cb->ac" : f32[T, 8]', "has 2 operands, got 1"),
    ('%s = contract(%x, %w) eq="ab,cb->az" : f32[T, 8]', "axes that no operand has"),
    ('%s = contract(%x, %w) eq="ab,cb" : f32[T, 8]', "its equation is 'ab,cb', expected one such as"),
    ("%s = contract(%x, %w) : f32[T, 8]", "its equation is None"),
    ("%a, %b = topk(%x) k=2 dim=1 : f32[T, 3], i64[T, 2]", r"expected the shape \[T, 2\]"),
    ("%a, %b = topk(%x) k=2 dim=1 : f32[T, 2], i64[T, 3]", r"expected the shape \[T, 2\]"),
    ("%a, %b = topk(%x) k=2 dim=1 : f32[T, 2], f32[T, 2]", "expected the dtype i64"),
    ("%a, %b = topk(%x) k=2 dim=1 : bf16[T, 2], i64[T, 2]", "expected the dtype f32"),
    ("%a, %b = topk(%x) k=65 dim=1 : f32[T, 65], i64[T, 65]", "k=65 is more than the 64 entries along dim=1"),
    ("%a, %b = topk(%x) k=2 dim=2 : f32[T, 2], i64[T, 2]", r"dim=2 is not an axis of its operand f32\[T, 64\]"),
    ("%a = topk(%x) k=2 dim=1 : f32[T, 2]", "it has 1 results, expected values and indices"),
    ("%a = softmax(%x) dim=-3 : f32[T, 64]", "dim=-3 is not an axis"),
    ("%a = softmax(%x) dim=1 : f32[T, 32]", r"expected the shape \[T, 64\]"),
    ("%a = reduce_sum(%x) dims=[1] keepdim=True : f32[T]", r"expected the shape \[T, 1\]"),
    ("%a = reduce_sum(%x) dims=[2] : f32[T]", r"dims=\[2\] are not axes"),
    ("%a = index(%x, %i) dim=0 : f32[T, 3, 64]", r"expected the shape \[T, 2, 64\]"),
    ("%a = index(%x, %i, %i, %i) dim=0 : f32[T, 2]", "3 indices from dim=0 are more than the axes"),
    ("%a = index(%x, %i) dim=0 : bf16[T, 2, 64]", "expected the dtype f32"),
    ("%a = gather(%x, %off) dim=1 : f32[8]", "has another number of axes than its operand"),
    ("%a = gather(%x, %i) dim=1 : f32[T, 64]", r"expected the shape \[T, 2\]"),
    ("%a = index_add(%x, %i, %w) dim=0 : f32[T, 63]", r"expected the shape \[T, 64\]"),
    ("%a = index_put(%x, %w, %i) dim=0 : f16[T, 64]", "expected the dtype f32"),
    ("%a = one_hot(%i) classes=8 : i64[T, 8]", r"expected the shape \[T, 2, 8\]"),
    ("%a = reshape(%x) : f32[64*T + 1]", r"f32\[T, 64\] has not as many elements as its result"),
    ("%a = reshape(%w) : f32[8, 63]", "has not as many elements"),
    ("%a = reshape(%w) : f16[64, 8]", "expected the dtype f32"),
    ("%a = permute(%e) dims=[0, 2, 2] : f32[8, 32, 64]", r"dims=\[0, 2, 2\] is no order of the 3 axes"),
    ("%a = permute(%e) dims=[0, 2, 1] : f32[8, 64, 32]", r"expected the shape \[8, 32, 64\]"),
    ("%a = slice(%x) dim=1 start=0 stop=64 step=2 : f32[T, 64]", r"expected the shape \[T, 32\]"),
    ("%a = slice(%x) dim=0 start=0 stop=4 step=1 : f32[4, 63]", r"expected the shape \[4, 64\]"),
    ("%a = expand(%x) : f32[T, 128]", r"does not expand to its result f32\[T, 128\]"),
    ("%a = cat([%x, %w]) dim=0 : f32[T, 64]", r"expected the shape \[T \+ 8, 64\]"),
    ("%a = cat([%x, %i]) dim=0 : f32[2*T, 64]", r"expected the shape \[2\*T, 2\]"),
    ('%a = cast(%x) dtype="bf16" : f16[T, 64]', "expected the dtype bf16"),
    ('%a = cast(%x) dtype="bf16" : bf16[T, 2]', r"expected the shape \[T, 64\]"),
    ("%a = arange() : i64[T, 2]", "expected one axis"),
    ("%a = grouped(%x, %w, %off) : f32[T, 32]", r"expected rows \[S, K\] and weights \[E, K, N\]"),
    ("%a = grouped(%i, %e, %off) : f32[T, 32]", "do not agree in K"),
    ("%a = mul(%x, %i) : f32[T, 64]", r"%i: i64\[T, 2\] does not broadcast"),
    ("%a = mul(%x, %c) : f32[T, 64]", r"%c: f32\[5, T, 1\] does not broadcast"),
    ("%a = silu(%x, %x) : f32[T, 64]", "it takes 1 operands, got 2"),
    ("%a = neg(%later) : any", "%later is used before it is defined"),
    ("%a = opaque([1, [%later]]) : any", "%later is used before it is defined"),
    ("%x = neg(%x) : f32[T, 64]", "%x is defined a second time"),
    ("%a, %a = opaque(%x) : any, any", "two of its results have one name"),
    ("%a, %b = opaque(%x) : any", "it has 2 results and 1 types"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_invalid_instructions(line, message):
    with pytest.raises(VerifyError, match=message):
        verify(graph(line))


def test_every_checked_word_has_a_good_and_a_bad_case():
    said_good = {i.word for line in GOOD for i in graph(line).instrs}
    said_bad = {parse("graph() {\n" + line + "\n return\n}").instrs[0].word for line, _ in BAD}
    alike = {"counts", "where_indices", "detach", "sort", "cumsum", "scatter", "scatter_add", "index_copy"}
    families = (
        {w for w in CHECKS if w.startswith("reduce_")} | {w for w in CHECKS if CHECKS[w] is CHECKS["mul"]} | alike
    )
    assert set(CHECKS) - families - said_bad == set()
    assert set(CHECKS) - families - said_good == set()


def test_names_of_inputs_and_outputs():
    twice = Graph((("x", Type("any")), ("x", Type("any"))), (), ())
    with pytest.raises(VerifyError, match="input %x is defined twice"):
        verify(twice)
    with pytest.raises(VerifyError, match="output %nowhere is defined nowhere"):
        verify(graph(outputs="%x, %nowhere"))
    verify(graph(outputs="%x, %x"))


def test_the_error_names_the_instruction_and_shows_its_neighbours():
    lines = [f"%v{i} = neg(%x) : f32[T, 64]" for i in range(9)]
    lines[5] = "%v5 = neg(%x) : f32[T, 63]    # model.py:41"
    with pytest.raises(VerifyError) as error:
        verify(graph(*lines))
    assert str(error.value).startswith("%v5 = neg(…) at model.py:41: its operand %x: f32[T, 64] does not broadcast")
    note = "\n".join(error.value.__notes__).split("\n")
    assert note[0] == "instruction 5 of 9 and its neighbours:"
    assert note[1:] == [("> " if i == 5 else "  ") + line for i, line in enumerate(lines) if 2 <= i <= 8]


def test_only_what_can_be_decided_differs():
    T, U = symbol("T"), symbol("u0")
    assert not differ(T, U)
    assert not differ(2 * T, U)
    assert not differ(T * (T + 1), T**2 + T)
    assert differ(T, T + 1)
    assert differ(2 * T, 2 * U + 1)
    assert differ(sympy.Integer(2), sympy.Integer(3))


def chain(count):
    T, lots = symbol("T"), []
    wide, narrow, ids = (Type("f32", (T, sympy.Integer(n))) for n in (64, 8, 8))
    for i in range(0, count, 4):
        lots.append(Instr((f"s{i}",), "contract", (Ref("x"), Ref("w")), (narrow,), (("eq", "ab,cb->ac"),)))
        indices = replace(ids, dtype="i64")
        lots.append(Instr((f"v{i}", f"i{i}"), "topk", (Ref(f"s{i}"),), (narrow, indices), (("k", 8), ("dim", 1))))
        lots.append(Instr((f"m{i}",), "mul", (Ref(f"v{i}"), 2.0), (narrow,)))
        lots.append(Instr((f"c{i}",), "cast", (Ref(f"m{i}"),), (narrow,), (("dtype", "f32"),)))
    inputs = (("x", wide), ("w", Type("f32", (sympy.Integer(8), sympy.Integer(64)))))
    return Graph(inputs, tuple(lots), (f"c{count - 4}",))


def test_time_is_linear_in_the_size_of_the_graph():
    verify(chain(400))
    seconds = []
    for count in (5_000, 40_000):
        big = chain(count)
        start = time.process_time()
        verify(big)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 24 * max(seconds[0], 0.01), seconds
    assert seconds[1] < 4.0, seconds


class Sweep:
    name = "sweep"

    def run(self, before, facts):
        after = sweep(before)
        return Outcome(
            after if len(after.instrs) < len(before.instrs) else before, len(before.instrs) - len(after.instrs)
        )


class Break:
    name = "break"

    def run(self, before, facts):
        return Outcome(before.with_instrs(before.instrs[1:]), 1)


TWO = ("%a = neg(%x) : f32[T, 64]", "%dead = neg(%a) : f32[T, 64]", "%b = exp(%a) : f32[T, 64]")


def test_recording_keeps_what_each_pass_did():
    records: list[PassRecord] = []
    after = run_pipeline((Sweep(), Sweep()), graph(*TWO, outputs="%b"), Facts(), (recording(records),))
    assert [(r.name, r.rewrites) for r in records] == [("sweep", 1), ("sweep", 0)]
    assert [r.text for r in records] == [dump(after)] * 2
    assert "%dead" not in records[0].text
    assert all(r.milliseconds >= 0 for r in records)


def test_verifying_names_the_pass_that_broke_the_graph():
    run_pipeline((Sweep(), Sweep()), graph(*TWO, outputs="%b"), Facts(), (verifying(),))
    with pytest.raises(VerifyError, match=r"after pass 'break': %dead = neg\(…\): %a is used before") as error:
        run_pipeline((Break(), Sweep()), graph(*TWO, outputs="%b"), Facts(), (verifying(),))
    assert "> %dead = neg(%a)" in "\n".join(error.value.__notes__)


def test_verifying_looks_at_the_graph_before_the_first_pass():
    broken = graph("%a = neg(%later) : any", outputs="%a")
    with pytest.raises(VerifyError, match="before pass 'sweep': "):
        run_pipeline((Sweep(),), broken, Facts(), (verifying(),))


T = symbol("T")
SITE = ir.Site(
    name="mlp",
    x="x",
    y="y",
    x_type=Type("f32", (T, sympy.Integer(64))),
    y_type=Type("f32", (T, sympy.Integer(64))),
    num_experts=sympy.Integer(8),
    score=ir.Score("softmax", "w"),
    select=ir.Select("topk", sympy.Integer(2), 2 * T),
    weight=ir.Weight("score"),
    dispatch=ir.Dispatch(2 * T),
    body=ir.Body("gated", "mul(silu(a), b)", sympy.Integer(32), "concat", params=(("ab", ("p",)), ("out", ("q",)))),
    combine=ir.Combine(),
    loc="model.py:3",
)


def test_valid_sites():
    verify_site(SITE)
    verify_site(replace(SITE, select=replace(SITE.select, k=sympy.Integer(8), nnz=8 * T), dispatch=ir.Dispatch(8 * T)))
    verify_site(replace(SITE, dispatch=ir.Dispatch(2 * T + 120, padding=16)))
    verify_site(replace(SITE, body=ir.Body("mlp", "relu(a)", symbol("F"))))
    verify_site(replace(SITE, body=ir.Body("opaque", "", sympy.Integer(0))))
    verify_site(replace(SITE, num_experts=symbol("E")))
    batched = Type("f32", (symbol("B"), symbol("S"), sympy.Integer(64)))
    verify_site(replace(SITE, x_type=batched, y_type=batched))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("select", {"algorithm": "bottomk"}, "site mlp at model.py:3: select.algorithm is 'bottomk', expected one of"),
        ("select", {"k": sympy.Integer(9)}, "k is 9, more than the 8 experts"),
        ("select", {"k": sympy.Integer(0)}, "k is 0, expected a positive size"),
        ("select", {"nnz": 2 * T + 1}, r"dispatch has 2\*T rows for 2\*T \+ 1 chosen pairs"),
        ("select", {"groups": 4, "topk_group": 5}, "select keeps 5 of 4 groups"),
        ("weight", {"source": "luck"}, "weight.source is 'luck'"),
        ("dispatch", {"granularity": "word"}, "dispatch.granularity is 'word'"),
        ("dispatch", {"padding": 0}, "dispatch.padding is 0"),
        ("body", {"kind": "mlp"}, "kind 'mlp' has gate='concat'"),
        ("body", {"gate": "none"}, "kind 'gated' has gate='none'"),
        ("body", {"layout_in": "kk"}, "body.layout_in is 'kk'"),
        ("body", {"activation": "mul(silu(a), c)"}, "uses c, which a body with gate='concat' does not have"),
        ("body", {"activation": "sin(a)"}, "activation does not parse: unknown pointwise function 'sin'"),
        ("body", {"params": (("ab", ("p",)), ("ab", ("q",)))}, "have a role twice"),
        ("body", {"transform": ir.ParamTransform("magic")}, "body.transform.kind is 'magic'"),
        ("combine", {"weight_on": "both"}, "combine.weight_on is 'both'"),
    ],
)
def test_invalid_words(part, change, message):
    with pytest.raises(VerifyError, match=message):
        verify_site(replace(SITE, **{part: replace(getattr(SITE, part), **change)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": sympy.Integer(0)}, "E is 0, expected a positive size"),
        ({"y_type": Type("f32", (T + 1, sympy.Integer(64)))}, "with different numbers of tokens"),
        ({"x_type": Type("f32")}, "expected tensors with a last axis H"),
        ({"capacity": ir.Capacity(T, "luck")}, "capacity.order is 'luck'"),
        ({"name": "", "loc": "", "num_experts": sympy.Integer(-1)}, r"site \(unnamed\): E is -1"),
    ],
)
def test_invalid_sites(change, message):
    with pytest.raises(VerifyError, match=message):
        verify_site(replace(SITE, **change))
