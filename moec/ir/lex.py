"""Tokens of the text forms, and a reader over them whose errors say where, what was found and what was expected."""

from __future__ import annotations

import json
import math
import re
from typing import NamedTuple, NoReturn

from moec.errors import ParseError

_NAME = r"[A-Za-z0-9_]+(?:(?:\.|::)[A-Za-z0-9_]+)*"
_STRING = r'"(?:[^"\\\n]|\\.)*"'
_TOKEN = re.compile(
    rf"""
    (?P<space>[ \t\r]+)
  | (?P<newline>\n)
  | (?P<comment>\#[^\n]*)
  | (?P<string>{_STRING})
  | (?P<value>%(?:{_NAME}|{_STRING})?)
  | (?P<site>@(?:{_NAME}|{_STRING}))
  | (?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?![A-Za-z0-9_]))
  | (?P<name>(?!\d){_NAME})
  | (?P<mark>->|\.\.|\*\*|//|[()\[\]{{}},:=+\-*/])
  | (?P<bad>.)
    """,
    re.VERBOSE | re.ASCII,
)
_PLAIN_WORD = re.compile(rf"(?!\d){_NAME}", re.ASCII)
_PLAIN_VALUE = re.compile(_NAME, re.ASCII)
_RESERVED = frozenset({"return", "inf", "nan", "True", "False", "None"})


class Token(NamedTuple):
    """A piece of text and where it starts."""

    kind: str
    text: str
    at: int


def quote(text: str) -> str:
    """`text` in double quotes, on one line."""
    return json.dumps(text, ensure_ascii=False)


def word_text(word: str) -> str:
    """A word as it stands, or quoted where it would not read back."""
    return word if _PLAIN_WORD.fullmatch(word) and word not in _RESERVED else quote(word)


def value_text(name: str) -> str:
    """`%name`, quoted where it would not read back."""
    return f"%{name if _PLAIN_VALUE.fullmatch(name) else quote(name)}"


def loc_text(loc: str) -> str:
    """`    # file.py:12`, or nothing where the place is not known."""
    if not loc:
        return ""
    plain = loc == loc.strip() and loc.isprintable() and not loc.startswith('"')
    return f"    # {loc if plain else quote(loc)}"


class Reader:
    """A cursor over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        matches = ((m.lastgroup or "", m) for m in _TOKEN.finditer(text))
        self.tokens = [Token(kind, m.group(), m.start()) for kind, m in matches if kind != "space"]
        self.tokens.append(Token("end", "", len(text)))
        self.index = 0

    @property
    def peek(self) -> Token:
        """The next token."""
        return self.tokens[self.index]

    @property
    def after(self) -> Token:
        """The token after the next."""
        return self.tokens[min(self.index + 1, len(self.tokens) - 1)]

    def take(self) -> Token:
        """The next token; the cursor moves past it."""
        token = self.tokens[self.index]
        self.index = min(self.index + 1, len(self.tokens) - 1)
        return token

    def sees(self, text: str) -> bool:
        """Whether this mark or name comes next."""
        token = self.tokens[self.index]
        return token.text == text and token.kind in ("mark", "name")

    def accept(self, text: str) -> bool:
        """Move past this mark or name if it comes next."""
        found = self.sees(text)
        self.index += found
        return found

    def expect(self, text: str) -> None:
        """Move past this mark or name; ParseError if something else comes next."""
        if not self.accept(text):
            self.fail(repr(text))

    def word(self, what: str = "a word") -> str:
        """A plain or quoted word."""
        token = self.peek
        if token.kind == "string":
            return self.string()
        if token.kind != "name":
            self.fail(what)
        return self.take().text

    def string(self) -> str:
        """A quoted string."""
        if self.peek.kind != "string":
            self.fail("a quoted string")
        return self._unquoted(self.take(), 0)

    def value(self) -> str:
        """The name in `%name`."""
        if self.peek.kind != "value" or self.peek.text == "%":
            self.fail("a value such as %x")
        return self._unquoted(self.take(), 1)

    def site(self) -> str:
        """The name in `@name`."""
        if self.peek.kind != "site":
            self.fail("a name such as @model.layers.0.mlp")
        return self._unquoted(self.take(), 1)

    def number(self) -> int | float:
        """A number, with its sign; `inf` and `nan` are floats, `nan` always the object `math.nan`."""
        negative = self.accept("-")
        token = self.peek
        if token.kind == "name" and token.text in ("inf", "nan"):
            self.take()
            value = math.inf if token.text == "inf" else math.nan
            return -value if negative and token.text == "inf" else value
        if token.kind != "number":
            self.fail("a number")
        text = self.take().text
        number = int(text) if text.isdigit() else float(text)
        return -number if negative else number

    def text_since(self, start: Token) -> str:
        """The text from a token up to the cursor."""
        last = self.tokens[max(self.index - 1, 0)]
        return self.text[start.at : last.at + len(last.text)]

    def newlines(self) -> None:
        """Skip ends of lines, and lines that are only a comment."""
        while self.peek.kind == "newline" or (self.peek.kind == "comment" and self.after.kind in ("newline", "end")):
            self.take()

    def end_of_line(self, what: str = "the end of the line") -> str:
        """Move past the line's end; the text of its comment, or ''."""
        loc = ""
        if self.peek.kind == "comment":
            token = self.take()
            loc = token.text[1:].strip()
            loc = self._unquoted(Token("string", loc, token.at), 0) if loc.startswith('"') else loc
        if self.peek.kind not in ("newline", "end"):
            self.fail(what)
        self.take()
        return loc

    def fail(self, expected: str, at: Token | None = None, found: str | None = None) -> NoReturn:
        """Raise ParseError at a token (the next, by default)."""
        at = at or self.peek
        line_start = self.text.rfind("\n", 0, at.at) + 1
        line = self.text[line_start:].partition("\n")[0]
        number, column = self.text.count("\n", 0, at.at) + 1, at.at - line_start
        names = {"newline": "the end of the line", "end": "the end of the text"}
        found = found or names.get(at.kind, repr(at.text))
        caret = " " * column + "^"
        message = f"line {number}, column {column + 1}: expected {expected}, found {found}"
        raise ParseError(f"{message}\n  {line}\n  {caret}")

    def _unquoted(self, token: Token, skip: int) -> str:
        text = token.text[skip:]
        if not text.startswith('"'):
            return text
        try:
            return str(json.loads(text))
        except json.JSONDecodeError as error:
            self.fail("a string with JSON's escapes", token, f"{text} ({error.msg})")
