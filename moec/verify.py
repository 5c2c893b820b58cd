"""What must hold between any two passes, and the observers that check and record it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import sympy

from moec.errors import ParseError, VerifyError
from moec.ir import expr as ex
from moec.ir import site as ir
from moec.ir.graph import Arg, Graph, Instr, Ref, Type
from moec.ir.lex import value_text
from moec.ir.text import dump, instr_text
from moec.ir.word_checks import check_word, differ
from moec.pipeline import Observer, Step
from moec.report import PassRecord

NEIGHBOURS = 3
"""Instructions shown before and after a faulty one."""


def verify(graph: Graph) -> None:
    """Check names, order, arity, and the types of well-known words, in one walk; VerifyError names the instruction."""
    types: dict[str, Type] = {}
    for name, kind in graph.inputs:
        if name in types:
            raise VerifyError(f"input {value_text(name)} is defined twice")
        types[name] = kind
    for at, instr in enumerate(graph.instrs):
        wrong = _undefined(instr.args, types) or _results(instr, types) or check_word(instr, types)
        if wrong:
            raise _error(graph, at, wrong)
        for name, kind in zip(instr.results, instr.types, strict=True):
            types[name] = kind
    for name in graph.outputs:
        if name not in types:
            raise VerifyError(f"output {value_text(name)} is defined nowhere")


def _undefined(args: Iterable[Arg], types: Mapping[str, Type]) -> str:
    for arg in args:
        if isinstance(arg, Ref):
            if arg.name not in types:
                return f"{value_text(arg.name)} is used before it is defined"
        elif isinstance(arg, tuple):
            wrong = _undefined(arg, types)
            if wrong:
                return wrong
    return ""


def _results(instr: Instr, types: Mapping[str, Type]) -> str:
    results = instr.results
    for name in results:
        if name in types:
            return f"{value_text(name)} is defined a second time"
    if len(results) != len(instr.types):
        return f"it has {len(results)} results and {len(instr.types)} types"
    if len(results) > 1 and len(set(results)) != len(results):
        return "two of its results have one name"
    return ""


def _error(graph: Graph, at: int, wrong: str) -> VerifyError:
    instr = graph.instrs[at]
    low, high = max(at - NEIGHBOURS, 0), at + NEIGHBOURS + 1
    shown = (f"{'>' if i == at else ' '} {instr_text(each)}" for i, each in enumerate(graph.instrs[low:high], low))
    note = "\n".join((f"instruction {at} of {len(graph.instrs)} and its neighbours:", *shown))
    name = ", ".join(map(value_text, instr.results)) or instr.word
    message = f"{name} = {instr.word}(…)" if instr.results else f"{instr.word}(…)"
    return with_note(f"{message}{f' at {instr.loc}' if instr.loc else ''}: {wrong}", note)


def with_note(message: str, note: str) -> VerifyError:
    """The error with a note below its message."""
    if sys.version_info < (3, 11):
        return VerifyError(f"{message}\n{note}")
    error = VerifyError(message)
    error.add_note(note)
    return error


def verifying() -> Observer:
    """An observer that verifies the graph before the first pass and after every pass, naming the pass at fault."""
    last: list[Graph | None] = [None]

    def observe(step: Step) -> None:
        for graph, when in ((step.before, "before"), (step.outcome.graph, "after")):
            if graph is last[0]:
                continue
            try:
                verify(graph)
            except VerifyError as error:
                notes = "\n".join(getattr(error, "__notes__", ()))
                raise with_note(f"{when} pass {step.name!r}: {error}", notes) from None
            last[0] = graph

    return observe


def recording(into: list[PassRecord]) -> Observer:
    """An observer that appends each pass's rewrites, time and the graph's text after it."""

    def observe(step: Step) -> None:
        unchanged = bool(into) and step.outcome.graph is step.before
        text = into[-1].text if unchanged else dump(step.outcome.graph)
        into.append(PassRecord(step.name, step.outcome.rewrites, step.seconds * 1e3, text))

    return observe


def verify_site(site: ir.Site) -> None:
    """Check a site's words against each other; VerifyError names the site and the field."""
    for wrong in _site_problems(site):
        raise VerifyError(f"site {site.name or '(unnamed)'}{f' at {site.loc}' if site.loc else ''}: {wrong}")


VOCABULARY: Mapping[str, frozenset[str]] = {
    name: frozenset(words.split())
    for name, words in {
        "select.algorithm": "topk argmax expert_choice segment_topk sinkhorn assignment table threshold given",
        "select.budget": "token expert segment",
        "weight.source": "score choice given",
        "capacity.order": "position choice score",
        "capacity.drop": "zero passthrough never",
        "dispatch.granularity": "token sequence sample",
        "body.kind": "mlp gated linear glu opaque",
        "body.gate": "none concat interleaved separate",
        "body.layout_in": "nk kn",
        "body.layout_out": "nk kn",
        "body.transform.kind": "identity merge usv dequant replica lora",
        "combine.weight_on": "output input",
    }.items()
}
"""The words that fields of a site may hold, as moec.ir.site documents them."""


def _site_problems(site: ir.Site) -> Iterable[str]:
    yield from _spelling(site)
    yield from _sizes(site)
    yield from _body_problems(site.body)
    if not site.x_type.rank or not site.y_type.rank:
        yield f"%x is {site.x_type} and %y is {site.y_type}, expected tensors with a last axis H"
    if site.select.groups < 1 or not 1 <= site.select.topk_group <= site.select.groups:
        yield f"select keeps {site.select.topk_group} of {site.select.groups} groups"
    if site.dispatch.padding < 1:
        yield f"dispatch.padding is {site.dispatch.padding}, expected at least 1"


def _spelling(site: ir.Site) -> Iterable[str]:
    for path, words in VOCABULARY.items():
        value: object = site
        for name in path.split("."):
            value = getattr(value, name, None)
        if value is not None and value not in words:
            yield f"{path} is {value!r}, expected one of {', '.join(sorted(words))}"


def _sizes(site: ir.Site) -> Iterable[str]:
    sizes = {"E": site.num_experts, "k": site.select.k, "F": site.body.width}
    for letter, size in sizes.items():
        if size.is_Integer and int(size) < (letter != "F"):
            yield f"{letter} is {size}, expected a positive size"
    if site.select.budget == "token" and (site.num_experts - site.select.k).is_negative:
        yield f"k is {site.select.k}, more than the {site.num_experts} experts there are"
    plain = site.dispatch.granularity == "token" and site.dispatch.padding == 1 and site.capacity is None
    if plain and differ(site.dispatch.rows, site.select.nnz):
        yield f"dispatch has {site.dispatch.rows} rows for {site.select.nnz} chosen pairs, and no padding or capacity"
    tokens = sympy.Mul(*site.x_type.shape[:-1]), sympy.Mul(*site.y_type.shape[:-1])
    if differ(*tokens):
        yield f"%x is {site.x_type} and %y is {site.y_type}, with different numbers of tokens"


def _body_problems(body: ir.Body) -> Iterable[str]:
    roles = [role for role, _ in body.params]
    if len(set(roles)) != len(roles):
        yield f"the body's parameters {', '.join(roles)} have a role twice"
    if body.kind == "opaque":
        return
    if (body.kind in ("mlp", "linear")) != (body.gate == "none"):
        yield f"a body of kind {body.kind!r} has gate={body.gate!r}, expected 'none' for mlp and linear, and only there"
    try:
        names = ex.variables(ex.parse(body.activation))
    except ParseError as error:
        yield f"the body's activation does not parse: {error}"
        return
    allowed = {"a"} if body.gate == "none" else {"a", "b"}
    if not names <= allowed:
        extra = ", ".join(sorted(names - allowed))
        yield f"the activation {body.activation} uses {extra}, which a body with gate={body.gate!r} does not have"
