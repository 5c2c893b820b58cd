"""Small sizes for a region: every large dimension replaced so that what was equal, or a multiple, still is.

Dynamo writes static sizes into the graph as plain numbers (`view(4096, 2048)`), so sizes cannot be shrunk in the leaves
alone: each number above SMALL, in a shape or an argument, is an atom, a multiple of one, or a product of two.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_aggregate

from moec.passes.raising.raise_graph import fake
from moec.proof.copying import Size
from moec.proof.region import Pair

SMALL = 64
"""Numbers up to this are kept: they are cheap, and may be axes, groups or counts."""

LARGEST = 1 << 40
"""Numbers from this on say 'to the end'."""

ATOMS = (24, 40, 56, 72, 88, 104, 136, 152, 184, 232)
"""What atoms become: distinct multiples of 8."""

TOKENS = (13, 7, 16, 8, 24, 12, 32, 64, 96, 128)


@dataclass(frozen=True)
class Sizes:
    """Values for the graph's symbols, and what large numbers become."""

    symbols: Mapping[sympy.Symbol, int]
    numbers: Mapping[int, int]

    def dim(self, expr: sympy.Expr) -> int:
        """A dimension in these sizes."""
        swapped = expr.xreplace({sympy.Integer(a): sympy.Integer(b) for a, b in self.numbers.items()})
        return int(str(swapped.xreplace({s: sympy.Integer(v) for s, v in self.symbols.items()})))

    def shape(self, dims: Iterable[sympy.Expr]) -> tuple[int, ...]:
        """A shape in these sizes."""
        return tuple(map(self.dim, dims))

    def argument(self, value: Any) -> Any:
        """A node's arguments in these sizes."""
        return map_aggregate(value, self._one)

    def _one(self, value: Any) -> Any:
        if isinstance(value, Size):
            return self.dim(value.expr)
        if isinstance(value, int) and not isinstance(value, bool):
            small = self.numbers.get(abs(value), abs(value))
            return small if value >= 0 else -small
        return value


def shrunk(pair: Pair) -> tuple[Sizes, ...]:
    """Small sizes of the region, with different numbers of tokens where those are free; best first."""
    numbers = _numbers(pair)
    return tuple(Sizes(symbols, numbers) for symbols in _symbol_values(pair))


def full(pair: Pair) -> Sizes:
    """The sizes that were captured: numbers as they are, symbols as in the call that was traced."""
    env = _shape_env(pair)
    hints = {} if env is None else env.backed_var_to_val
    return Sizes({s: int(hints.get(s, 8)) for s in _symbols(pair)}, {})


def _expressions(pair: Pair) -> Iterator[sympy.Expr]:
    """Every size of the region: the leaves' dimensions, and numbers in arguments."""
    for leaf in pair.leaves:
        yield from leaf.type.shape
    found: list[sympy.Expr] = []

    def see(value: Any) -> Any:
        if isinstance(value, Size):
            found.append(value.expr)
        elif isinstance(value, int) and not isinstance(value, bool):
            found.append(sympy.Integer(value))
        return value

    for half in (pair.original, pair.replacement):
        for node in half.graph.nodes:
            map_aggregate((node.args, node.kwargs), see)
    yield from found


def _numbers(pair: Pair) -> dict[int, int]:
    """What each large number becomes."""
    integers = {abs(int(i)) for e in _expressions(pair) for i in e.atoms(sympy.Integer)}
    experts = dict(pair.site.attrs).get("experts")
    # One class more than there are experts is where masks put tokens that belong to none.
    fixed = {experts - 1, experts, experts + 1} if isinstance(experts, int) else set[int]()
    large = sorted(n for n in integers - fixed if SMALL < n < LARGEST)
    return _assign(large, fixed, {n for n in integers if n <= SMALL} | fixed)


def _assign(large: list[int], fixed: Collection[int], taken: Collection[int]) -> dict[int, int]:
    """Atoms, their multiples and products, in ascending order; a multiple of the largest first: 2 F before 7 H."""
    becomes: dict[int, int] = {}
    free = iter([n for n in ATOMS if n not in taken])
    for n in large:
        pairs = itertools.combinations_with_replacement(becomes, 2)
        product = next(((a, b) for a, b in pairs if a * b == n), None)
        if product is not None:
            becomes[n] = becomes[product[0]] * becomes[product[1]]
            continue
        base = next((a for a in reversed(becomes) if n % a == 0 and (n // a <= SMALL or n // a in fixed)), None)
        if base is not None:
            becomes[n] = becomes[base] * (n // base)
            continue
        atom = next((a for a in free if a < n), None)
        if atom is None:
            return {}  # more kinds of sizes than small numbers to tell them apart: keep all as they are
        becomes[n] = atom
    return becomes


def _symbols(pair: Pair) -> list[sympy.Symbol]:
    found = {s for e in _expressions(pair) for s in e.free_symbols}
    return sorted((s for s in found if isinstance(s, sympy.Symbol)), key=str)


def _symbol_values(pair: Pair) -> list[dict[sympy.Symbol, int]]:
    """Up to two assignments of the symbols that keep every guard of the capture."""
    symbols = _symbols(pair)
    if not symbols:
        return [{}]
    env, found = _shape_env(pair), list[dict[sympy.Symbol, int]]()
    others = itertools.product((2, 3, 4, 8, 1), repeat=len(symbols) - 1)
    for rest, tokens in itertools.islice(itertools.product(others, TOKENS), 400):
        values: dict[sympy.Symbol, int] = dict(zip(symbols, (*rest, tokens), strict=True))
        if _allowed(env, values):
            found.append(values)
            if len(found) == 2:
                break
    return found


def _allowed(env: Any, values: Mapping[sympy.Symbol, int]) -> bool:
    """Whether the graph was captured for these sizes too."""
    if env is None:
        return True
    numbers = {s: sympy.Integer(v) for s, v in values.items()}
    for symbol, value in values.items():
        bounds = env.var_to_range.get(symbol)
        if bounds is not None and not bounds.lower <= value <= bounds.upper:
            return False
    for guard in env.guards:
        if guard.expr.free_symbols <= values.keys() and guard.expr.xreplace(numbers) == sympy.false:
            return False
    return True


def _shape_env(pair: Pair) -> Any:
    for half in (pair.original, pair.replacement):
        for node in half.graph.nodes:
            env = _env_of(node)
            if env is not None:
                return env
    for leaf in pair.leaves:
        env = _env_of(leaf.node) if leaf.node is not None else None
        if env is not None:
            return env
    return None


def _env_of(node: fx.Node) -> Any:
    value = fake(node)
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    return next((s.node.shape_env for s in sizes if isinstance(s, torch.SymInt)), None)
