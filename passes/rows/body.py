"""Read an expert's function off its row expression: which matrices, which activation, where the routing weight goes."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from moec.ir import expr as ex
from moec.ir.dtypes import DTYPES
from moec.ir.graph import Dim, Graph
from moec.ir.match import NoMatch
from moec.ir.spec import ExpertsSpec
from moec.passes.rows.coded import coding_of, scale_shape
from moec.passes.rows.rows import Apply, Cast, Dot, Expert, Gate, Number, Row, Slice, Slot, Token, strip, text

NOTHING = "*0"
"""Behind a parameter's name: as many zeros, for a projection that has no bias where the other has one."""


@dataclass(frozen=True)
class Projection:
    """One projection of the row that the activation reads: x·W[e] + b[e], all of it or a slice of its outputs."""

    weight: Expert
    axis: int
    bias: Expert | None
    part: tuple[int, int, int] | None


@dataclass(frozen=True)
class BodyMatch:
    """An expert understood.

    token, weight  the values x[T, H] and w[T, k] (or g[T, E] when `gated_by_expert`); weight '' means 1
    params         value names in the order of `spec.param_groups`, each one name or E names; see NOTHING
    scales         the shapes of one expert's scales, which are the last of `params`
    out            numbers of an expert's output
    cast           the dtype that all parameters are to be cast to first
    """

    spec: ExpertsSpec
    token: str
    weight: str
    by_expert: bool
    params: tuple[tuple[str, ...], ...]
    num_experts: Dim
    width: Dim
    out: Dim
    scales: tuple[tuple[Dim, ...], ...] = ()
    cast: str = ""


def match_body(graph: Graph, row: Row, first: int | None = None) -> BodyMatch | NoMatch:
    """The expert behind a weighted row; `first`: only so many experts run, their parameters may be of more."""
    weight, inner = split_weight(row)
    if isinstance(inner, NoMatch):
        return inner
    read = _read(graph, inner)
    if isinstance(read, NoMatch):
        return read
    phi, found, tokens, down, bias_out = read
    if len(tokens) != 1 or not found:
        return NoMatch(f"an expert reads {len(tokens)} inputs, expected one token row", depth=4)
    given, token = split_weight(next(iter(tokens)))
    if isinstance(token, NoMatch) or not isinstance(strip(token), Token):
        return NoMatch(f"an expert reads {text(next(iter(tokens)))[:120]}, expected a token's row", depth=4)
    if given is not None and weight is not None:
        return NoMatch("routing weights are applied to both input and output", depth=4)
    return _assemble(graph, phi, found, down, bias_out, strip(token), (weight, given), first)


def split_weight(row: Row) -> tuple[Slot | Gate | None, Row | NoMatch]:
    """The routing weight that multiplies a row, and the row without it."""
    row = strip(row)
    if isinstance(row, Apply) and row.fn == "mul":
        for factor, rest in (row.args, row.args[::-1]):
            if isinstance(strip(factor), Number) and not isinstance(strip(rest), Slot | Gate):
                weight, inner = split_weight(rest)
                return (None, row) if weight is None else (weight, _times(inner, factor))
            if isinstance(strip(factor), Slot | Gate):
                again, inner = split_weight(rest)
                if again is not None:
                    return None, NoMatch("a row is multiplied by two routing weights", depth=3)
                held = strip(factor)
                assert isinstance(held, Slot | Gate)
                return held, inner
    return None, row


_Read = tuple[ex.Expr, list[Projection], set[Row], Dot | None, Expert | None]


def _read(graph: Graph, inner: Row) -> _Read | NoMatch:
    """φ, the projections that it reads, what these read, and the output matrix with its bias, where there is one."""
    found: list[Projection] = []
    tokens: set[Row] = set()
    phi = _activation(graph, inner, found, tokens)
    if not isinstance(phi, NoMatch) and all(isinstance(_unweighted(token), Token) for token in tokens):
        return phi, found, tokens, None, None
    factor, scaled = _split_number(inner)
    down, bias_out = _split_bias(scaled)
    if not isinstance(down, Dot):
        return NoMatch(f"an expert's output is {text(inner)[:120]}, expected a product with its output matrix", depth=2)
    found, tokens = [], set()
    phi = _activation(graph, down.row, found, tokens)
    if isinstance(phi, NoMatch):
        return phi.deeper(4)
    if factor != 1.0 and bias_out is not None:
        return NoMatch(f"an expert's output and its bias are multiplied by {factor}", depth=4)
    # A number times the output is that number times what the output matrix reads.
    return (phi if factor == 1.0 else ex.call("mul", phi, ex.Const(factor))), found, tokens, down, bias_out


def _times(row: Row | NoMatch, number: Row) -> Row | NoMatch:
    return row if isinstance(row, NoMatch) else Apply("mul", (row, number))


def _unweighted(row: Row) -> Row | NoMatch:
    inner = split_weight(row)[1]
    return inner if isinstance(inner, NoMatch) else strip(inner)


def _split_number(row: Row) -> tuple[float, Row]:
    """c·r → (c, r); (1, r) where no number multiplies r."""
    row = strip(row)
    if isinstance(row, Apply) and row.fn == "mul":
        for number, rest in (row.args, row.args[::-1]):
            held = strip(number)
            if isinstance(held, Number):
                value, inner = _split_number(rest)
                return held.value * value, inner
    return 1.0, row


def _split_bias(row: Row) -> tuple[Row, Expert | None]:
    """r + b[e] → (r, b)."""
    row = strip(row)
    if isinstance(row, Apply) and row.fn == "add":
        for bias, rest in (row.args, row.args[::-1]):
            held = strip(bias)
            if isinstance(held, Expert) and len(held.order) == 1:
                return strip(rest), held
    return row, None


def _projection(row: Row) -> tuple[Projection, Row] | None:
    """The projection that `row` is, and the row it reads."""
    part = None
    inner = strip(row)
    if isinstance(inner, Slice):
        part, inner = (inner.start, inner.stop, inner.step), strip(inner.row)
    dot, bias = _split_bias(inner)
    if not isinstance(dot, Dot):
        return None
    return Projection(dot.weight, dot.axis, bias, part), dot.row


def _activation(graph: Graph, row: Row, found: list[Projection], tokens: set[Row]) -> ex.Expr | NoMatch:
    """The activation as an expression over projections p0, p1, …, which are collected in `found`."""
    projected = _projection(row)
    if projected is not None:
        projection, token = projected
        tokens.add(strip(token))
        if projection not in found:
            found.append(projection)
        return ex.Var(f"p{found.index(projection)}")
    match row:
        case Number(value):
            return ex.Const(value)
        case Cast(inner, dtype):
            if dtype not in DTYPES:
                return NoMatch(f"an activation is cast to {dtype}")
            return _activation(graph, inner, found, tokens)
        case Apply("pow", (base, Number(2.0))):
            inner = _activation(graph, base, found, tokens)
            return inner if isinstance(inner, NoMatch) else ex.Call("mul", (inner, inner))
        case Apply(fn, args) if fn in ex.POINTWISE:
            parts = [_activation(graph, arg, found, tokens) for arg in args]
            misses = [p for p in parts if isinstance(p, NoMatch)]
            return misses[0] if misses else ex.call(fn, *(p for p in parts if not isinstance(p, NoMatch)))
        case _:
            return NoMatch(f"between its matrices an expert computes {text(row)[:120]}, expected pointwise functions")


def _matrix_dims(graph: Graph, weight: Expert) -> tuple[Dim, ...]:
    """The sizes of an expert's matrix, in its own order."""
    shape = graph.types[weight.values[0]].shape[1 if weight.stacked else 0 :]
    return tuple(shape[i] for i in weight.order)


def _layout(weight: Expert, axis: int) -> str:
    """nk when the stored matrix has its output axis first."""
    return "nk" if weight.order[axis] == 1 else "kn"


def _gate(graph: Graph, found: list[Projection]) -> tuple[str, list[Projection]] | NoMatch:
    """How the projections share tensors, and the projections in the order a, b."""
    if len(found) == 1:
        if found[0].part is not None:
            return NoMatch(f"only the slice {found[0].part} of a projection is used", depth=5)
        return "none", found
    if len(found) != 2:
        return NoMatch(f"an activation reads {len(found)} projections, expected 1 or 2", depth=5)
    first, second = found
    if first.part is None and second.part is None:
        return "separate", found
    if (first.weight, first.axis, first.bias) != (second.weight, second.axis, second.bias):
        return NoMatch("slices of two different projections", depth=5)
    total = _matrix_dims(graph, first.weight)[1 - first.axis]
    if not total.is_Integer:
        return NoMatch(f"expert width {total} is not a number", depth=5)
    n = int(total)
    halves = {
        (0, n // 2, 1): ("concat", 0),
        (n // 2, n, 1): ("concat", 1),
        (0, n, 2): ("interleaved", 0),
        (1, n, 2): ("interleaved", 1),
    }
    kinds = [halves.get(p.part) if p.part is not None else None for p in found]
    if n % 2 or kinds[0] is None or kinds[1] is None or kinds[0][0] != kinds[1][0] or kinds[0][1] == kinds[1][1]:
        return NoMatch(f"projections are the slices {first.part} and {second.part} of {n} outputs", depth=5)
    return kinds[0][0], sorted(found, key=lambda p: halves[p.part][1] if p.part is not None else 0)


@dataclass(frozen=True)
class _Parts:
    """An expert's tensors.

    kind     how projections share tensors                order     the projections a and b
    first    one projection for each of their tensors     bias_out  what is added to the output
    down     the output matrix's product, None where there is none
    """

    kind: str
    order: list[Projection]
    first: list[Projection]
    down: Dot | None
    bias_out: Expert | None

    @property
    def matrices(self) -> list[tuple[Expert, int]]:
        """Each matrix and the axis of it that is summed over."""
        last = [] if self.down is None else [(self.down.weight, self.down.axis)]
        return [*((p.weight, p.axis) for p in self.first), *last]

    @property
    def weights(self) -> list[Expert]:
        """The matrices, in the order of `spec.param_groups`."""
        return [weight for weight, _ in self.matrices]

    @property
    def biases(self) -> list[Expert]:
        """The biases that there are."""
        return [b for b in (*(p.bias for p in self.first), self.bias_out) if b is not None]

    @property
    def bias_in(self) -> Expert | None:
        """A bias of a projection."""
        return next((p.bias for p in self.first if p.bias is not None), None)


def _assemble(
    graph: Graph,
    phi: ex.Expr,
    found: list[Projection],
    down: Dot | None,
    bias_out: Expert | None,
    token: Row,
    factors: tuple[Slot | Gate | None, Slot | Gate | None],
    first: int | None,
) -> BodyMatch | NoMatch:
    weight, given = factors  # of the output and of the input: at most one is there
    gate = _gate(graph, found)
    if isinstance(gate, NoMatch):
        return gate
    kind, order = gate
    parts = _Parts(kind, order, order[:1] if kind != "separate" else order, down, bias_out)
    stored = _stored(graph, parts, first)
    if isinstance(stored, NoMatch):
        return stored
    count, codes, dtype, biases = stored
    names = {f"p{found.index(p)}": letter for p, letter in zip(order, "ab", strict=False)}
    factor = weight if weight is not None else given
    spec = ExpertsSpec(
        dtype=dtype,
        gate=kind,
        layout_in=_layout(order[0].weight, order[0].axis),
        layout_out="nk" if down is None else _layout(down.weight, down.axis),
        activation=str(_rename(phi, names)),
        bias_in=parts.bias_in is not None,
        bias_out=bias_out is not None,
        weight_on="input" if given is not None else "output",
        stacked=order[0].weight.stacked,
        codes="" if codes == "cast" else codes,
        out=down is not None,
        biases=biases,
    )
    scaled = [w for w in parts.weights if w.scale]
    assert isinstance(token, Token)
    return BodyMatch(
        spec,
        token.value,
        factor.value if factor is not None else "",
        isinstance(factor, Gate),
        (*(w.values for w in parts.weights), *_bias_values(parts), *(w.scale for w in scaled)),
        count,
        *_widths(graph, parts),
        tuple(scale_shape(graph, w) for w in scaled),
        dtype if codes == "cast" else "",
    )


def _stored(graph: Graph, parts: _Parts, first: int | None) -> tuple[Dim, str, str, str] | NoMatch:
    """How many experts run, how matrices are kept, the dtype of products, and that of biases where it is another."""
    if first is not None and parts.bias_in is not None and any(p.bias is None for p in parts.first):
        return NoMatch("one projection has a bias, the other has none, in a loop over some experts", depth=6)
    flat = next((w for w in parts.weights if len(w.order) != 2), None)
    if flat is not None:
        return NoMatch(f"an expert's matrix %{flat.values[0]} has {len(flat.order)} axes, expected 2", depth=6)
    count = _plain(graph, [*parts.weights, *parts.biases], first)
    if isinstance(count, NoMatch):
        return count
    coded = coding_of(graph, parts.matrices)
    if isinstance(coded, NoMatch):
        return coded
    codes, dtype = coded
    if dtype not in DTYPES:
        return NoMatch(f"experts' parameters are {dtype}, expected one of f32, bf16, f16", depth=6)
    biases = _bias_dtype(graph, parts.biases, dtype)
    if isinstance(biases, NoMatch):
        return biases
    if len({_layout(p.weight, p.axis) for p in parts.first}) > 1:
        return NoMatch("the projections are stored in different layouts", depth=6)
    return count, codes, dtype, biases


def _bias_dtype(graph: Graph, biases: list[Expert], dtype: str) -> str | NoMatch:
    """The dtype that kernels read biases in, '' for that of products: each number as it is added, or exactly it.

    What is added to a narrower product makes it wider, and what is narrower becomes as wide.
    """
    kept = [(graph.types[b.values[0]].dtype, b.to) for b in biases]
    used = {to or stored for stored, to in kept}
    if used <= {dtype}:
        return ""
    rounded = any(to not in ("", "f32", stored) for stored, to in kept)  # kernels are given one cast of what is stored
    if rounded or not used <= ({"f32", dtype} if dtype != "f32" else DTYPES.keys()):
        return NoMatch(f"matrices are used in {dtype}, biases in {', '.join(sorted(used))}", depth=6)
    return "" if dtype == "f32" else "f32"


def _bias_values(parts: _Parts) -> list[tuple[str, ...]]:
    """The values of each bias; see NOTHING for a projection that has none where the other has one."""
    some, last = parts.bias_in, parts.bias_out
    zeros = () if some is None else tuple(name + NOTHING for name in some.values)
    first = [] if some is None else [zeros if p.bias is None else p.bias.values for p in parts.first]
    return first if last is None else [*first, last.values]


def _widths(graph: Graph, parts: _Parts) -> tuple[Dim, Dim]:
    """(F, O)."""
    if parts.down is not None:
        dims = _matrix_dims(graph, parts.down.weight)
        return dims[parts.down.axis], dims[1 - parts.down.axis]
    some = parts.order[0]
    rows = _matrix_dims(graph, some.weight)[1 - some.axis]
    width = rows / 2 if parts.kind in ("concat", "interleaved") else rows
    return width, width


def _plain(graph: Graph, tensors: list[Expert], first: int | None) -> Dim | NoMatch:
    """The number of experts that run, when all parameters agree on it and on how they are bound."""
    counts = {graph.types[t.values[0]].shape[0] if t.stacked else sympy.Integer(len(t.values)) for t in tensors}
    dtypes = {t.to or graph.types[name].dtype for t in tensors for name in t.values}
    stored = {frozenset(graph.types[name].dtype for name in t.values) for t in tensors}
    if first is not None and all(count.is_Integer and count >= first for count in counts):
        counts = {sympy.Integer(first)}
    if len(counts) != 1 or len({t.stacked for t in tensors}) != 1:
        return NoMatch(f"parameters disagree on the number of experts: {sorted(map(str, counts))}", depth=6)
    if not dtypes <= DTYPES.keys():
        return NoMatch(f"experts' parameters are {', '.join(sorted(dtypes))}, expected one of f32, bf16, f16", depth=6)
    if any(len(kinds) > 1 for kinds in stored):
        return NoMatch("one parameter's dtype differs from expert to expert", depth=6)
    return counts.pop()


def _rename(phi: ex.Expr, names: dict[str, str]) -> ex.Expr:
    if isinstance(phi, ex.Var):
        return ex.Var(names[phi.name])
    if isinstance(phi, ex.Const):
        return phi
    return ex.Call(phi.fn, tuple(_rename(arg, names) for arg in phi.args))
