"""Read a score function: what is computed of the logits x·Wᵀ + b, pointwise and by at most one softmax over experts.

    30·tanh(logits / 30), softmax, sqrt   →   score=sqrt(softmax), softmax_of=mul(tanh(div(logits, 30.0)), 30.0)

An expression is in fp32; a step that the graph computes in half precision is rounded where the graph rounds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from moec.ir import expr as ex
from moec.ir.graph import Arg, Graph, Instr, Ref
from moec.ir.match import NoMatch

_LOGITS = ex.Var("logits")
_ROUND = {"bf16": "round_bf16", "f16": "round_f16"}
_FLOATS = ("f32", *_ROUND)


@dataclass(frozen=True)
class Score:
    """score[T, E] over `logits` or `softmax`, what the softmax is of, and which value the logits are."""

    score: ex.Expr
    softmax_of: ex.Expr
    logits: str

    def rounded_at_last(self, dtype: str) -> Score:
        """The same where the result is rounded to `dtype` in any case."""
        last = self.score
        ends = isinstance(last, ex.Call) and last.fn == _ROUND.get(dtype)
        return replace(self, score=last.args[0]) if ends and isinstance(last, ex.Call) else self


def read_score(graph: Graph, name: str) -> Score | NoMatch:
    """The score function whose result is the value `name`."""
    reader = _Reader(graph, lambda value: linear(graph, value) is not None)
    return reader.score(name)


def read_step(graph: Graph, name: str, leaf: str) -> Score | None:
    """What is computed of the value `leaf` to make `name`, where that is pointwise; the leaf is called `logits`."""
    found = _Reader(graph, lambda value: value == leaf).score(name)
    return None if isinstance(found, NoMatch) or "softmax" in ex.variables(found.score) else found


def linear(graph: Graph, name: str) -> tuple[Instr, str] | None:
    """The product x·Wᵀ behind x·Wᵀ + b, and b; '' where there is none."""
    made = graph.defs.get(name)
    bias = ""
    if made is not None and made.word == "add" and len(made.uses) == 2 and graph.types[made.uses[1]].rank == 1:
        bias = made.uses[1]
        made = graph.defs.get(made.uses[0])
    found = made is not None and made.word == "contract" and made.attr("eq") == "ab,cb->ac"
    return (made, bias) if made is not None and found else None


class _Reader:
    """Walks from a value down to logits. It knows the values already read: an expression may use one twice."""

    def __init__(self, graph: Graph, is_logits: Callable[[str], bool]) -> None:
        self.graph, self.is_logits = graph, is_logits
        self.logits = self.softmax = ""
        self.softmax_of: ex.Expr = _LOGITS
        self.known: dict[str, ex.Expr | NoMatch] = {}

    def score(self, name: str) -> Score | NoMatch:
        """`name` as a score."""
        found = self.pointwise(name)
        if isinstance(found, NoMatch):
            return found
        if not self.logits or len(ex.variables(found)) != 1:
            return NoMatch("a score is not a function of either the logits or their softmax", name)
        return Score(found, self.softmax_of, self.logits)

    def pointwise(self, arg: Arg) -> ex.Expr | NoMatch:
        """An expression over `logits` and `softmax`."""
        if isinstance(arg, int | float):
            return ex.Const(float(arg))
        name = arg if isinstance(arg, str) else arg.name if isinstance(arg, Ref) else ""
        if name not in self.known:
            self.known[name] = self._read(name)
        return self.known[name]

    def _read(self, name: str) -> ex.Expr | NoMatch:
        if self.is_logits(name):
            if self.logits not in ("", name):
                return NoMatch("a score is made of two linear maps of the token", name)
            self.logits = name
            return _LOGITS
        made = self.graph.defs.get(name)
        dtype = self.graph.types[name].dtype if name in self.graph.types else ""
        if made is None or dtype not in _FLOATS:
            return NoMatch("scores do not come from one linear map of the token", name)
        if made.word == "same":
            return self.pointwise(made.args[0])
        if made.word == "cast":
            inner, before = self.pointwise(made.args[0]), self.graph.types[made.uses[0]].dtype
            return inner if before == dtype or dtype == "f32" else self._in(dtype, inner)
        return self._in(dtype, self._softmax(made) if made.word == "softmax" else self._call(made))

    def _in(self, dtype: str, value: ex.Expr | NoMatch) -> ex.Expr | NoMatch:
        """`value` rounded to a half precision."""
        fn = _ROUND.get(dtype)
        if fn is None or isinstance(value, NoMatch) or (isinstance(value, ex.Call) and value.fn == fn):
            return value
        return ex.call(fn, value)

    def _softmax(self, made: Instr) -> ex.Expr | NoMatch:
        if made.attr("dim") != 1:
            return NoMatch("softmax is over another axis than experts", made.results[0])
        if self.softmax not in ("", made.results[0]):
            return NoMatch("a score is made of two softmaxes", made.results[0])
        inner = self.pointwise(made.args[0])
        if isinstance(inner, NoMatch):
            return inner
        if "softmax" in ex.variables(inner):
            return NoMatch("a softmax of a softmax", made.results[0])
        self.softmax, self.softmax_of = made.results[0], inner
        return ex.Var("softmax")

    def _call(self, made: Instr) -> ex.Expr | NoMatch:
        shape = made.types[0].shape
        other = next((u for u in made.uses if self.graph.types[u].shape != shape), None)
        if other is not None:
            return NoMatch(f"a score is computed with {self.graph.types[other]}, expected numbers and scores", other)
        if made.word == "pow" and made.args[1:] in ((2,), (2.0,)):
            inner = self.pointwise(made.args[0])
            return inner if isinstance(inner, NoMatch) else ex.call("mul", inner, inner)
        if made.word not in ex.POINTWISE or ex.POINTWISE[made.word].arity != len(made.args):
            return NoMatch(f"a score is computed by `{made.word}`, expected pointwise functions", made.results[0])
        parts: list[ex.Expr] = []
        for arg in made.args:
            part = self.pointwise(arg)
            if isinstance(part, NoMatch):
                return part
            parts.append(part)
        return ex.call(made.word, *parts)
