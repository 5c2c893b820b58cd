"""Sites from their text: what `moec.ir.site_text.dump_site` prints, read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from moec.errors import ParseError
from moec.ir import expr as ex
from moec.ir import site as ir
from moec.ir.dims import read_dim
from moec.ir.field_text import Words, read_tail
from moec.ir.graph import Type
from moec.ir.lex import Reader, Token, value_text, word_text
from moec.ir.site_text import run
from moec.ir.site_types import derived_types
from moec.ir.text import items, listed, read_type


class Typed(NamedTuple):
    """Types that a text states: they have to be the ones that follow from the rest."""

    left: str
    types: tuple[Type, ...]
    at: Token


@dataclass
class Draft:
    """What has been read of a site: its constructor's arguments, and the types that were stated.

    `word` is the line read last, `owed` its operands whose values have yet to come in lines of their own.
    """

    x: str
    y: str
    words: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    many: dict[str, list[Any]] = field(default_factory=lambda: {"states": [], "aux": [], "guards": []})
    typed: list[Typed] = field(default_factory=list)
    word: str = ""
    owed: list[str] = field(default_factory=list)


def parse_site(text: str) -> ir.Site:
    """The site that dumps as `text`; ParseError says where, what was found and what was expected."""
    reader = Reader(text)
    reader.newlines()
    start = reader.peek
    reader.expect("moe")
    name = reader.site()
    x, x_type = _typed_value(reader)
    reader.expect("->")
    y, y_type = _typed_value(reader)
    draft = Draft(x, y, {"name": name, "x": x, "y": y, "x_type": x_type, "y_type": y_type})
    read_tail(reader, ir.Site, draft.words)
    reader.expect("{")
    draft.words["loc"] = reader.end_of_line()
    reader.newlines()
    while not reader.sees("}"):
        _read_line(reader, draft)
        reader.newlines()
    _settled(reader, draft)
    reader.expect("}")
    reader.newlines()
    if reader.peek.kind != "end":
        reader.fail("the end of the text after '}'")
    return _finish(reader, draft, start)


def _typed_value(reader: Reader) -> tuple[str, Type]:
    reader.expect("(")
    name = reader.value()
    reader.expect(":")
    kind = read_type(reader)
    reader.expect(")")
    return name, kind


def _finish(reader: Reader, draft: Draft, start: Token) -> ir.Site:
    if draft.body:
        draft.words["body"] = ir.Body(**draft.body)
    needed = ("num_experts", "score", "select", "weight", "dispatch", "body", "combine")
    missing = [{"num_experts": "E="}.get(word, word) for word in needed if word not in draft.words]
    if missing:
        reader.fail(f"a site with {', '.join(missing)}", start, "none")
    words: dict[str, Any] = draft.words | {name: tuple(found) for name, found in draft.many.items()}
    site = ir.Site(**words)
    derived = derived_types(site)
    for left, types, at in draft.typed:
        expected = derived.get(left)
        if expected != types:
            wanted = ", ".join(map(str, expected)) if expected else "no type"
            reader.fail(f"{wanted}, which follows from the rest of the site", at, ", ".join(map(str, types)))
    return site


def _settled(reader: Reader, draft: Draft) -> None:
    if draft.owed:
        reader.fail(f"the line '{draft.owed[0]} = %name' of {draft.word!r}")


def _read_line(reader: Reader, draft: Draft) -> None:
    """One line of the block: a word of the flow, the value of an operand of the last one, or a clause."""
    if reader.peek.kind == "value":
        _settled(reader, draft)
        _read_flow(reader, draft)
    elif reader.after.text == "=":
        _read_operand(reader, draft)
    elif reader.peek.text in CLAUSES:
        _settled(reader, draft)
        CLAUSES[reader.take().text](reader, draft)
    else:
        reader.fail(f"'%name = word …', an operand 'role = %name' or one of {', '.join(CLAUSES)}")
    reader.end_of_line("a field, ':' and types, or the end of the line")


def _read_flow(reader: Reader, draft: Draft) -> None:
    start = reader.peek
    left = ", ".join(map(value_text, listed(reader, Reader.value)))
    reader.expect("=")
    if reader.peek.text not in FLOW:
        reader.fail(f"one of {', '.join(FLOW)}")
    draft.word = reader.take().text
    expected = LEFT.get(draft.word, value_text(draft.y))
    if left != expected:
        reader.fail(f"{expected} left of {draft.word!r}", start, left)
    FLOW[draft.word](reader, draft, left)


def _tail(reader: Reader, draft: Draft, cls: type[Words], left: str, into: dict[str, Any]) -> dict[str, Any]:
    """The rest of a line: fields, then types, then fields."""
    read_tail(reader, cls, into)
    if reader.accept(":"):
        at = reader.peek
        draft.typed.append(Typed(left, listed(reader, read_type), at))
        read_tail(reader, cls, into)
    return into


def _put(reader: Reader, draft: Draft, word: str, value: Any) -> None:
    """Keep a word that a site has once."""
    if word in draft.words:
        reader.fail(f"one {word!r} a site", found="a second one")
    draft.words[word] = value


def _is(reader: Reader, *texts: str) -> None:
    """Move past tokens that are the same in every site."""
    for text in texts:
        if reader.peek.text != text:
            reader.fail(repr(text))
        reader.take()


def _operand(reader: Reader, name: str) -> None:
    if reader.peek.kind != "value" or reader.value() != name:
        reader.fail(f"{value_text(name)!r}")


def _score(reader: Reader, draft: Draft, left: str) -> None:
    into: dict[str, Any] = {"fn": reader.word("a score function")}
    _is(reader, "(")
    if reader.accept("linear"):
        _is(reader, "(")
        _operand(reader, draft.x)
        for operand in ("weight", "bias"):
            if reader.sees(",") and reader.after.text == operand:
                _is(reader, ",", operand)
                draft.owed.append(operand)
        _is(reader, ")")
    else:
        _operand(reader, draft.x)
    _is(reader, "in")
    into["compute"] = reader.word("a dtype")
    _is(reader, ")", "as")
    into["dtype"] = reader.word("a dtype")
    _put(reader, draft, "score", ir.Score(**_tail(reader, draft, ir.Score, left, into)))


def _select(reader: Reader, draft: Draft, left: str) -> None:
    into: dict[str, Any] = {"algorithm": reader.word("an algorithm")}
    _is(reader, "(", "%s")
    if reader.accept("+"):
        _is(reader, "bias")
        draft.owed.append("bias")
    _is(reader, ",", "k", "=")
    into["k"] = read_dim(reader)
    _is(reader, ",", "per", "=")
    into["budget"] = reader.word("token, expert or segment")
    _is(reader, ")")
    at = reader.peek
    into = _tail(reader, draft, ir.Select, left, into)
    if "nnz" not in into:
        reader.fail("nnz=… (the number of chosen pairs) in this line", at, "none")
    _put(reader, draft, "select", ir.Select(**into))


def _weight(reader: Reader, draft: Draft, left: str) -> None:
    into: dict[str, Any] = {}
    depth = 0
    for name, field_name in (("renormalize", "renormalize"), ("softmax", "softmax_over_k")):
        if reader.after.text == "(" and reader.accept(name):
            _is(reader, "(")
            into[field_name] = True
            depth += 1
    into["source"] = reader.word("score, choice or given")
    _is(reader, "[", "%e", "]", *")" * depth, "as")
    into["dtype"] = reader.word("a dtype")
    _put(reader, draft, "weight", ir.Weight(**_tail(reader, draft, ir.Weight, left, into)))


def _dispatch(reader: Reader, draft: Draft, left: str) -> None:
    _is(reader, "ragged", "(")
    _operand(reader, draft.x)
    _is(reader, ",", "%e", ",", "by", "=")
    into: dict[str, Any] = {"granularity": reader.word("token, sequence or sample")}
    _is(reader, ")")
    at = reader.peek
    into = _tail(reader, draft, ir.Dispatch, left, into)
    if "rows" not in into:
        reader.fail("rows=… (the number of rows) in this line", at, "none")
    _put(reader, draft, "dispatch", ir.Dispatch(**into))


def _body(reader: Reader, draft: Draft, left: str) -> None:
    if draft.body:
        reader.fail("one 'body' a site", found="a second one")
    into: dict[str, Any] = {"kind": reader.word("mlp, gated, linear, glu or opaque"), "activation": _activation(reader)}
    _is(reader, "of", "%r", "in")
    into["dtype"] = reader.word("a dtype")
    at = reader.peek
    draft.body = _tail(reader, draft, ir.Body, left, into)
    if "width" not in draft.body:
        reader.fail("F=… (an expert's width) in this line", at, "none")


def _activation(reader: Reader) -> str:
    """A quoted string as it is; else the text of one expression."""
    if reader.peek.kind == "string":
        return reader.string()
    start = reader.peek
    reader.accept("-")
    reader.take()
    depth = 0
    while depth or reader.sees("("):
        token = reader.peek
        if token.kind in ("newline", "end"):
            reader.fail("')'")
        depth += (token.text == "(") - (token.text == ")")
        reader.take()
    text = reader.text_since(start)
    try:
        ex.parse(text)
    except ParseError as error:
        reader.fail(f"an activation ({error})", start, repr(text))
    return text


def _read_operand(reader: Reader, draft: Draft) -> None:
    if draft.owed:
        operand = draft.owed.pop(0)
        _is(reader, operand, "=")
        draft.words[draft.word] = replace(draft.words[draft.word], **{operand: reader.value()})
        return
    if draft.word != "body":
        reader.fail(f"no operand: all that {draft.word!r} uses is there" if draft.word else "'%s = score …' first")
    role = reader.word("a parameter's role")
    reader.expect("=")
    draft.body["params"] = (*draft.body.get("params", ()), (role, _names(reader)))
    if reader.accept(":"):
        at = reader.peek
        draft.typed.append(Typed(word_text(role), listed(reader, read_type), at))


def _names(reader: Reader) -> tuple[str, ...]:
    if not reader.accept("["):
        return (reader.value(),)
    start = reader.peek
    if reader.after.text != "..":
        return items(reader, Reader.value, "]")
    first = reader.value()
    reader.expect("..")
    last = reader.value()
    reader.expect("]")
    return run(first, last) or reader.fail("two names that differ in one rising number", start)


def _transform(reader: Reader, draft: Draft) -> None:
    if not draft.body:
        reader.fail("a transform after the 'body' line")
    into: dict[str, Any] = {"kind": reader.word("merge, usv, dequant, replica or lora")}
    _is(reader, "(")
    into["params"] = items(reader, Reader.value, ")")
    draft.body["transform"] = ir.ParamTransform(**_tail(reader, draft, ir.ParamTransform, "", into))


def _combine(reader: Reader, draft: Draft, left: str) -> None:
    _is(reader, "weighted_sum", "(", "%h", ",", "%w", ")", "in")
    into: dict[str, Any] = {"accumulate": reader.word("a dtype")}
    _is(reader, "as")
    into["dtype"] = reader.word("a dtype")
    _put(reader, draft, "combine", ir.Combine(**_tail(reader, draft, ir.Combine, left, into)))


def _capacity(reader: Reader, draft: Draft) -> None:
    at = reader.peek
    into = _tail(reader, draft, ir.Capacity, "", {})
    if "limit" not in into:
        reader.fail("limit=… (rows an expert) in this line", at, "none")
    _put(reader, draft, "capacity", ir.Capacity(**into))


def _shared(reader: Reader, draft: Draft) -> None:
    at = reader.peek
    into = _tail(reader, draft, ir.SharedExpert, "", {"activation": _activation(reader)})
    if "width" not in into:
        reader.fail("F=… (the shared expert's width) in this line", at, "none")
    _put(reader, draft, "shared", ir.SharedExpert(**into))


def _state(reader: Reader, draft: Draft) -> None:
    into: dict[str, Any] = {"name": reader.value(), "update": reader.string()}
    draft.many["states"].append(ir.State(**_tail(reader, draft, ir.State, "", into)))


def _aux(reader: Reader, draft: Draft) -> None:
    into: dict[str, Any] = {"kind": reader.word("what the value is, such as histogram")}
    _is(reader, "(")
    into["value"] = reader.value()
    _is(reader, ")")
    draft.many["aux"].append(ir.Aux(**_tail(reader, draft, ir.Aux, "", into)))


def _guard(reader: Reader, draft: Draft) -> None:
    into: dict[str, Any] = {"predicate": reader.string()}
    draft.many["guards"].append(ir.Guard(**_tail(reader, draft, ir.Guard, "", into)))


def _plan(reader: Reader, draft: Draft) -> None:
    _put(reader, draft, "plan", ir.Plan(**_tail(reader, draft, ir.Plan, "", {})))


FLOW: Mapping[str, Callable[[Reader, Draft, str], None]] = {
    "score": _score,
    "select": _select,
    "weight": _weight,
    "dispatch": _dispatch,
    "body": _body,
    "combine": _combine,
}

LEFT: Mapping[str, str] = {
    "score": "%s",
    "select": "%e, %p",
    "weight": "%w",
    "dispatch": "%r, %off",
    "body": "%h",
}
"""What each word of the flow defines; `combine` defines the site's result."""

CLAUSES: Mapping[str, Callable[[Reader, Draft], None]] = {
    "capacity": _capacity,
    "transform": _transform,
    "shared": _shared,
    "state": _state,
    "aux": _aux,
    "guard": _guard,
    "plan": _plan,
}
