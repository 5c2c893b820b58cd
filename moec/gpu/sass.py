"""NVIDIA machine code as text (`cuobjdump -sass`, `-res-usage`) → instructions, matrix work, load widths. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moec.errors import ParseError
from moec.gpu.hot_loop import Instruction

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_FUNCTION = re.compile(r"^\s*Function\s*:\s*(\S+)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_ADDRESS = re.compile(r"0x([0-9a-f]+)$")
_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)")
_GROUP_MMA = re.compile(r"^[A-Z]GMMA\.(?:\w+\.)*?(\d+)x(\d+)x(\d+)")
_WARP_MMA = re.compile(r"^[HIQDBO]MMA\.(?:SP\.|SF\.)?(\d+)")
_BLOCK_MMA = re.compile(r"^UTC[A-Z]MMA")

# M, N, K as the digits of a warp's instruction are read; 16816 could be read in more than one way.
_WARP_SHAPES = {
    "884": (8, 8, 4), "1684": (16, 8, 4), "1688": (16, 8, 8), "16816": (16, 8, 16), "16832": (16, 8, 32),
    "16864": (16, 8, 64), "8816": (8, 8, 16), "8832": (8, 8, 32), "168128": (16, 8, 128), "168256": (16, 8, 256),
}  # fmt: skip
_ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL", "BPT")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Usage:
    """What a kernel takes: registers and bytes of local memory a lane, bytes of shared memory fixed at compile time."""

    registers: int
    stack: int
    shared: int


def parse_usage(text: str) -> Usage:
    """`cuobjdump -res-usage`. Raises ParseError where no kernel is listed."""
    found = _USAGE.search(text)
    if not found:
        raise ParseError(f"resource usage {text[:80]!r}: expected 'REG:… STACK:… SHARED:…'")
    return Usage(*map(int, found.groups()))


def parse_sass(text: str, function: str | None = None) -> tuple[Instruction, ...]:
    """The instructions of one function (by default the first). Raises ParseError where it has none."""
    lines: list[tuple[int, str]] = []
    current = None
    for line in text.splitlines():
        name = _FUNCTION.match(line)
        if name:
            current = name[1]
            function = function or current
        found = _LINE.match(line)
        if found and current == function:
            lines.append((int(found[1], 16), found[2]))
    if not lines:
        raise ParseError(f"SASS: no instruction of function {function!r} in {len(text)} characters")
    index = {address: i for i, (address, _) in enumerate(lines)}
    return tuple(_instruction(body, index) for _, body in lines)


def _instruction(body: str, index: dict[int, int]) -> Instruction:
    guarded = _PREDICATE.match(body)
    plain = body[guarded.end() :] if guarded else body
    mnemonic, _, operands = plain.partition(" ")
    kind = mnemonic.partition(".")[0]
    if kind in ("BRA", "JMP"):
        found = _ADDRESS.search(operands)
        target = index.get(int(found[1], 16)) if found else None
        # `BRA.U UP0, 0x…` carries its condition as an operand.
        return Instruction(mnemonic, body, target, bool(guarded) or "," in operands)
    return Instruction(mnemonic, body, None, bool(guarded) or kind not in _ENDS)


def matrix_work(mnemonic: str, dot: tuple[int, int, int]) -> tuple[float, bool]:
    """Operations (2·M·N·K) that one instruction does for each warp, and whether it is for the whole block instead.

    The shape of a tcgen05 instruction is in a descriptor: it is taken from the source's `dot` (M, N, K), as the
    compiler chooses it: M up to 128, N up to 256, K of 32 bytes.
    """
    group = _GROUP_MMA.match(mnemonic)
    if group:
        m, n, k = map(int, group.groups())
        return 2.0 * m * n * k / 4, False
    warp = _WARP_MMA.match(mnemonic)
    if warp:
        m, n, k = _WARP_SHAPES.get(warp[1], (16, 8, 16))
        return 2.0 * m * n * k, False
    if _BLOCK_MMA.match(mnemonic):
        k = 16 if mnemonic.startswith("UTCH") else 32
        return 2.0 * min(dot[0], 128) * min(dot[1], 256) * k, True
    return 0.0, False


def load_width(one: Instruction) -> tuple[str, int] | None:
    """(name, bytes a lane) of an instruction that reads global memory; a bulk copy counts as 128 bytes."""
    parts = one.mnemonic.split(".")
    if parts[0] in ("UTMALDG", "UBLKCP", "LDGMC"):
        return parts[0], 128
    if parts[0] not in ("LDG", "LDGSTS", "LD"):
        return None
    width = next((part for part in reversed(parts) if part in _WIDTHS), "32")
    return f"{parts[0]}.{width}", _WIDTHS.get(width, 4)


def local_traffic(code: Sequence[Instruction]) -> tuple[int, int]:
    """(stores, loads) of local memory among these instructions: spilled registers and arrays that are indexed."""
    kinds = [one.mnemonic.partition(".")[0] for one in code]
    return kinds.count("STL"), kinds.count("LDL")


def shared_loads(code: Sequence[Instruction]) -> int:
    """Reads of shared memory that take effect; `@!PT` ones are fillers."""
    return sum(one.mnemonic.startswith("LDS") and not one.text.startswith("@!PT") for one in code)


def barriers(code: Sequence[Instruction]) -> int:
    """Waits for other warps."""
    return sum(one.mnemonic.partition(".")[0] in ("BAR", "SYNCS") for one in code)
