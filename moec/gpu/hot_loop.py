"""The hot loop of a kernel's machine code: the innermost loop with matrix instructions, and the way taken through it.

A loop's static size is no measure: a persistent kernel's flattened loop holds the epilogue as well, on a branch that
one iteration in many takes. Of all ways once round the loop this takes the one with most matrix arithmetic and, among
those, fewest instructions. What a spin on a barrier inside it costs is unknown and left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    mnemonic  with its suffixes, for example LDGSTS.E.BYPASS.128 or v_mfma_f32_32x32x8_bf16
    text      the line, as disassembled
    target    index of the instruction that it may branch to
    falls     whether control may go on to the next instruction
    """

    mnemonic: str
    text: str
    target: int | None = None
    falls: bool = True


@dataclass(frozen=True)
class _Blocks:
    starts: tuple[int, ...]  # first instruction of each block, ascending; the last entry is the end
    next: tuple[tuple[int, ...], ...]

    def instructions(self, block: int) -> range:
        return range(self.starts[block], self.starts[block + 1])


def hot_loop(code: Sequence[Instruction], work: Mapping[int, float]) -> tuple[int, ...] | None:
    """Indices of the instructions of one turn of the hot loop, in order; None where no loop does matrix arithmetic.

    `work` gives the matrix arithmetic of an instruction by its index; what is absent does none.
    """
    blocks = _blocks(code)
    load = [sum(work.get(i, 0.0) for i in blocks.instructions(b)) for b in range(len(blocks.next))]
    loops = [(header, body) for header, body in _loops(blocks) if any(load[b] for b in body)]
    inner = [(h, body) for h, body in loops if not any(other < body for _, other in loops)]
    if not inner:
        return None
    header, body = max(inner, key=lambda loop: (sum(load[b] for b in loop[1]), -len(loop[1])))
    path = _heaviest_way(blocks, header, body, load)
    return tuple(i for block in path for i in blocks.instructions(block))


def _blocks(code: Sequence[Instruction]) -> _Blocks:
    ends = {i + 1 for i, one in enumerate(code) if one.target is not None or not one.falls}
    targets = {one.target for one in code if one.target is not None}
    starts = sorted({0, len(code), *ends, *targets})
    number = {start: block for block, start in enumerate(starts)}
    following: list[tuple[int, ...]] = []
    for block in range(len(starts) - 1):
        last = code[starts[block + 1] - 1]
        ways = (*((last.target,) if last.target is not None else ()), *((starts[block + 1],) if last.falls else ()))
        following.append(tuple(number[way] for way in ways if way < len(code)))
    return _Blocks(tuple(starts), tuple(following))


def _loops(blocks: _Blocks) -> Iterator[tuple[int, frozenset[int]]]:
    """(header, body) of every loop: what reaches the jump back without passing the header."""
    before: dict[int, list[int]] = {}
    for block, ways in enumerate(blocks.next):
        for way in ways:
            before.setdefault(way, []).append(block)
    tails: dict[int, list[int]] = {}
    for block, header in _back_edges(blocks):
        tails.setdefault(header, []).append(block)
    for header, latches in tails.items():
        body = {header}
        todo = [latch for latch in latches if latch != header]
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo.extend(before.get(block, ()))
        yield header, frozenset(body)


def _back_edges(blocks: _Blocks) -> set[tuple[int, int]]:
    """Edges to a block on the way from the entry, by an iterative depth-first walk."""
    found: set[tuple[int, int]] = set()
    seen: set[int] = set()
    for root in range(len(blocks.next)):  # code behind an indirect branch has no edge from the entry
        if root in seen:
            continue
        seen.add(root)
        open_blocks = {root}
        stack: list[tuple[int, Iterator[int]]] = [(root, iter(blocks.next[root]))]
        while stack:
            block, ways = stack[-1]
            way = next(ways, None)
            if way is None:
                stack.pop()
                open_blocks.discard(block)
            elif way in open_blocks:
                found.add((block, way))
            elif way not in seen:
                seen.add(way)
                open_blocks.add(way)
                stack.append((way, iter(blocks.next[way])))
    return found


def _heaviest_way(blocks: _Blocks, header: int, body: Iterable[int], load: Sequence[float]) -> list[int]:
    """Blocks of the turn with most matrix arithmetic, then fewest instructions."""
    inside = frozenset(body)
    back = _back_edges(blocks)
    best: dict[int, tuple[tuple[float, int], list[int]]] = {}
    for block in _inner_first(blocks, header, inside, back):
        ways = [way for way in blocks.next[block] if way in inside and way != header and (block, way) not in back]
        choices = [best[way] for way in ways if way in best]
        if header in blocks.next[block]:
            choices.append(((0.0, 0), []))
        if not choices:
            continue  # leads out of the loop
        (work, size), path = max(choices, key=lambda choice: choice[0])
        best[block] = ((work + load[block], size - len(blocks.instructions(block))), [block, *path])
    return best[header][1]


def _inner_first(blocks: _Blocks, header: int, inside: frozenset[int], back: set[tuple[int, int]]) -> list[int]:
    """The loop's blocks so that each comes after all blocks that it leads to."""
    order: list[int] = []
    seen = {header}
    stack: list[tuple[int, Iterator[int]]] = [(header, iter(blocks.next[header]))]
    while stack:
        block, ways = stack[-1]
        way = next(ways, None)
        if way is None:
            stack.pop()
            order.append(block)
        elif way in inside and way not in seen and (block, way) not in back:
            seen.add(way)
            stack.append((way, iter(blocks.next[way])))
    return order
