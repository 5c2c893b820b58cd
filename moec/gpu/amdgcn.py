"""AMD assembly as the compiler prints it → instructions, register and memory use, matrix arithmetic. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moec.errors import ParseError
from moec.gpu.hot_loop import Instruction

_LABEL = re.compile(r"^([.\w$]+):")
_CODE = re.compile(r"^\t([a-z]\w*)(?:\s+(.*))?$")
_MATRIX = re.compile(r"^v_(?:s?mfma|smfmac|wmma|swmmac)c?_\w*?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?")
_WIDTH = re.compile(r"_(dwordx4|dwordx3|dwordx2|dword|[us]?short|[us]?byte|b128|b96|b64|b32|[ui]16|[ui]8)(?:_|$)")
_BYTES = {
    "dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "sshort": 2, "byte": 1, "ubyte": 1,
    "sbyte": 1, "b128": 16, "b96": 12, "b64": 8, "b32": 4, "u16": 2, "i16": 2, "u8": 1, "i8": 1,
}  # fmt: skip
_ENDS = ("s_endpgm", "s_setpc_b64", "s_trap")


@dataclass(frozen=True)
class Usage:
    """What a kernel takes: vector registers a lane (accumulators among them), spilled ones, bytes of scratch a lane."""

    registers: int
    spilled: int
    scratch: int


def parse_usage(text: str) -> Usage:
    """The kernel's metadata at the end of the listing. Raises ParseError where a figure is missing."""

    def figure(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s+(\d+)", text, re.MULTILINE)
        if not found:
            raise ParseError(f"AMD metadata: no .{name} in {len(text)} characters")
        return int(found[1])

    spilled = figure("vgpr_spill_count") + figure("sgpr_spill_count")
    return Usage(figure("vgpr_count"), spilled, figure("private_segment_fixed_size"))


def parse_amdgcn(text: str) -> tuple[Instruction, ...]:
    """The instructions of the listing's code. Raises ParseError where there are none."""
    bodies: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if line.lstrip().startswith((".section", ".amdgpu_metadata")) and bodies:
            break
        label = _LABEL.match(line)
        if label:
            labels[label[1]] = len(bodies)
            continue
        code = _CODE.match(line.rstrip())
        if code:
            bodies.append((code[1], code[2] or ""))
    if not bodies:
        raise ParseError(f"AMD assembly: no instruction in {len(text)} characters")
    return tuple(_instruction(name, operands, labels) for name, operands in bodies)


def _instruction(name: str, operands: str, labels: dict[str, int]) -> Instruction:
    body = f"{name} {operands}".strip()
    if name.startswith(("s_branch", "s_cbranch")):
        return Instruction(name, body, labels.get(operands.split(";")[0].strip()), name != "s_branch")
    return Instruction(name, body, None, name not in _ENDS)


def matrix_work(mnemonic: str) -> float:
    """Operations (2·M·N·K·blocks) that one instruction does for a wave; 0 for others."""
    found = _MATRIX.match(mnemonic)
    if not found:
        return 0.0
    m, n, k = map(int, found.groups()[:3])
    return 2.0 * m * n * k * int(found[4] or 1)


def load_width(one: Instruction) -> tuple[str, int] | None:
    """(name, bytes a lane) of an instruction that reads global memory and is no reload of a spilled register."""
    if not one.mnemonic.startswith(("buffer_load", "global_load", "flat_load")) or "Folded" in one.text:
        return None
    found = _WIDTH.search(one.mnemonic)
    width = found[1] if found else "dword"
    direct = " lds" if one.text.split(";")[0].rstrip().endswith(" lds") else ""
    return f"{one.mnemonic}{direct}", _BYTES[width]


def local_traffic(code: Sequence[Instruction]) -> tuple[int, int]:
    """(stores, loads) of scratch memory among these instructions."""
    stores = sum(one.mnemonic.startswith("scratch_store") or "Folded Spill" in one.text for one in code)
    loads = sum(one.mnemonic.startswith("scratch_load") or "Folded Reload" in one.text for one in code)
    return stores, loads


def shared_loads(code: Sequence[Instruction]) -> int:
    """Reads of shared memory (LDS)."""
    return sum(one.mnemonic.startswith(("ds_read", "ds_load")) for one in code)


def barriers(code: Sequence[Instruction]) -> int:
    """Waits for other waves."""
    return sum(one.mnemonic.startswith("s_barrier") for one in code)
