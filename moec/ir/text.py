"""Graphs as text and back: `parse(dump(graph)) == graph`, one instruction a line.

    graph(%x: f32[T, 2048], %w: f32[64, 2048]) {
      %s = contract(%x, %w) eq="ab,cb->ac" : f32[T, 64]    # model.py:11
      %a, %b = topk(%s) k=2 dim=1 : f32[T, 2], i64[T, 2]    # model.py:12
      return %a, %b
    }

Sizes must be in the normal form of `moec.ir.dims.normal_dim`, and a NaN must be `math.nan` itself to compare equal.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import TypeVar

from moec.ir.dims import read_dim
from moec.ir.graph import Arg, Attr, Graph, Instr, Ref, Type
from moec.ir.lex import Reader, loc_text, quote, value_text, word_text

WIDTH = 120
"""Columns beyond which a graph's inputs stand one a line."""

T = TypeVar("T")


def literal_text(value: Arg | Attr) -> str:
    """An argument or attribute: `%x`, `2`, `0.5`, `True`, `None`, `"ab,cb->ac"`, `[1, 2]`."""
    if isinstance(value, Ref):
        return value_text(value.name)
    if isinstance(value, tuple):
        return f"[{', '.join(map(literal_text, value))}]"
    return quote(value) if isinstance(value, str) else repr(value)


def instr_text(instr: Instr) -> str:
    """One instruction on one line, without indentation."""
    results = f"{', '.join(map(value_text, instr.results))} = " if instr.results else ""
    args = ", ".join(map(literal_text, instr.args))
    attrs = "".join(f" {word_text(name)}={literal_text(value)}" for name, value in instr.attrs)
    types = f" : {', '.join(map(str, instr.types))}" if instr.types else ""
    return f"{results}{word_text(instr.word)}({args}){attrs}{types}{loc_text(instr.loc)}"


def dump(graph: Graph) -> str:
    """The graph as text."""
    return "\n".join(_lines(graph)) + "\n"


def _lines(graph: Graph) -> Iterator[str]:
    inputs = [f"{value_text(name)}: {kind}" for name, kind in graph.inputs]
    if sum(map(len, inputs)) + 2 * len(inputs) <= WIDTH:
        yield f"graph({', '.join(inputs)}) {{"
    else:
        yield "graph("
        yield from (f"  {each}," for each in inputs)
        yield ") {"
    yield from (f"  {instr_text(instr)}" for instr in graph.instrs)
    yield f"  return {', '.join(map(value_text, graph.outputs))}".rstrip()
    yield "}"


def parse(text: str) -> Graph:
    """The graph that dumps as `text`; ParseError says where, what was found and what was expected."""
    reader = Reader(text)
    reader.newlines()
    reader.expect("graph")
    reader.expect("(")
    inputs = items(reader, _input, ")")
    reader.expect("{")
    reader.end_of_line("the end of the line after '{'")
    reader.newlines()
    instrs: list[Instr] = []
    while not (reader.sees("return") and reader.after.text != "("):
        instrs.append(_instr(reader))
        reader.newlines()
    reader.expect("return")
    outputs = listed(reader, Reader.value) if reader.peek.kind == "value" else ()
    reader.end_of_line("',' or the end of the line")
    reader.newlines()
    reader.expect("}")
    reader.newlines()
    if reader.peek.kind != "end":
        reader.fail("the end of the text after '}'")
    return Graph(inputs, tuple(instrs), outputs)


def _input(reader: Reader) -> tuple[str, Type]:
    name = reader.value()
    reader.expect(":")
    return name, read_type(reader)


def _instr(reader: Reader) -> Instr:
    results: tuple[str, ...] = ()
    if reader.peek.kind == "value":
        results = listed(reader, Reader.value)
        reader.expect("=")
    word = reader.word("an instruction: '%name = word(…)', 'word(…)' or 'return'")
    reader.expect("(")
    args = items(reader, read_arg, ")")
    attrs: list[tuple[str, Attr]] = []
    while reader.peek.kind in ("name", "string"):
        name = reader.word()
        reader.expect("=")
        attrs.append((name, _attr(reader)))
    types = listed(reader, read_type) if reader.accept(":") else ()
    loc = reader.end_of_line("an attribute, ':' and types, '# place' or the end of the line")
    return Instr(results, word, args, types, tuple(attrs), loc)


def read_type(reader: Reader) -> Type:
    """The type that comes next; ParseError."""
    dtype = reader.word("a type such as f32[T, 64]")
    if reader.accept("["):
        return Type(dtype, items(reader, read_dim, "]"))
    if dtype != "any":
        reader.fail("'[' and the sizes of a tensor (only the type 'any' has none)")
    return Type(dtype)


def read_arg(reader: Reader) -> Arg:
    """The operand that comes next: a value, a literal, or a list of such; ParseError."""
    if reader.peek.kind == "value":
        return Ref(reader.value())
    return items(reader, read_arg, "]") if reader.accept("[") else _literal(reader)


def _attr(reader: Reader) -> Attr:
    return items(reader, _attr, "]") if reader.accept("[") else _literal(reader)


def _literal(reader: Reader) -> int | float | bool | str | None:
    token = reader.peek
    if token.kind == "string":
        return reader.string()
    if token.kind == "name" and token.text in ("True", "False", "None"):
        reader.take()
        return {"True": True, "False": False, "None": None}[token.text]
    if token.kind == "number" or token.text in ("-", "inf", "nan"):
        return reader.number()
    reader.fail('a value: %name, a number, True, False, None, "text" or [a list]')


def listed(reader: Reader, read: Callable[[Reader], T]) -> tuple[T, ...]:
    """One or more, with commas between, on one line."""
    found = [read(reader)]
    while reader.accept(","):
        found.append(read(reader))
    return tuple(found)


def items(reader: Reader, read: Callable[[Reader], T], close: str) -> tuple[T, ...]:
    """None or more, with commas between, up to the closing bracket; may go over several lines."""
    found: list[T] = []
    reader.newlines()
    while not reader.accept(close):
        found.append(read(reader))
        reader.newlines()
        if not reader.accept(",") and not reader.sees(close):
            reader.fail(f"',' or {close!r}")
        reader.newlines()
    return tuple(found)


def diff(before: Graph, after: Graph, name: str = "pass", context: int = 3) -> str:
    """What a pass changed, as a unified diff of the texts; '' where nothing."""
    old, new = dump(before).split("\n"), dump(after).split("\n")
    return "\n".join(difflib.unified_diff(old, new, f"before {name}", f"after {name}", "", "", context, ""))
