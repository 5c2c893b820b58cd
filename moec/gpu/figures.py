"""What a compiled kernel's text says about it: registers, spills, memory, matrix instructions, its hot loop. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moec.gpu import amdgcn, sass
from moec.gpu.hot_loop import Instruction, hot_loop
from moec.gpu.occupancy import Occupancy, occupancy
from moec.gpu.target import GpuTarget

_DOT = re.compile(r"\btt\.dot(?:_scaled)?\b.*?:\s*tensor<(\d+)x(\d+)x(\w+)[^*]*\*\s*tensor<(\d+)x(\d+)x")
_WIDE = 16  # bytes a lane: the widest load that all targets have


@dataclass(frozen=True)
class Dots:
    """The matrix products of the source's innermost loop.

    shape  M, N, K of the largest one; operations: of all in one iteration; dtype of the left operand; in_loop: whether
    they stand in a loop at all
    """

    shape: tuple[int, int, int]
    operations: float
    dtype: str
    in_loop: bool


@dataclass(frozen=True)
class Loop:
    """The hot loop: `instructions` of one turn, which does `steps` iterations of the source's loop.

    loads         reads of global memory by instruction
    narrow        those of them that move fewer than 16 bytes a lane
    shared_loads, barriers, local: counts; local: reads and writes of spilled registers
    """

    instructions: int
    steps: float
    mma: Mapping[str, int]
    loads: Mapping[str, int]
    narrow: int
    shared_loads: int
    barriers: int
    local: int

    @property
    def per_step(self) -> float:
        """Instructions of a warp for each iteration of the source's loop."""
        return self.instructions / self.steps if self.steps else float(self.instructions)


@dataclass(frozen=True)
class Figures:
    """One kernel on one target.

    spill_stores, spill_loads  instructions that touch local memory, in the whole kernel; spilled: registers (AMD)
    stack        bytes of local memory a lane
    shared       bytes of shared memory a block; shared_limit: what the target allows, which compilers do not check
    warps        a block's, those that specialisation adds among them
    mma          matrix instructions of the whole kernel; loads: reads of global memory of the whole kernel
    specialized  whether warps really have different jobs (`ttg.warp_specialize` is in the compiler's IR)
    """

    registers: int
    spill_stores: int
    spill_loads: int
    spilled: int
    stack: int
    shared: int
    shared_limit: int
    warps: int
    occupancy: Occupancy
    instructions: int
    mma: Mapping[str, int]
    loads: Mapping[str, int]
    dots: Dots | None
    loop: Loop | None
    specialized: bool
    problems: tuple[str, ...] = ()


def read_figures(
    target: GpuTarget, texts: Mapping[str, str], shared: int, num_warps: int, total_warps: int = 0
) -> Figures:
    """Figures from the compiler's texts: ttir, ttgir and sass + usage (NVIDIA) or amdgcn (AMD).

    shared: bytes of dynamic shared memory; num_warps: as asked for; total_warps: with those that specialisation adds,
    where the compiler's metadata say so. Raises ParseError for a text without a kernel.
    """
    code, registers, spilled, stack = _machine(target, texts)
    reader = sass if target.backend == "cuda" else amdgcn
    dots = source_dots(texts["ttir"])
    specialized = "ttg.warp_specialize" in texts["ttgir"]
    warps, working = _warps(texts["ttgir"], num_warps)
    warps = max(warps, total_warps)
    stores, loads = reader.local_traffic(code)
    loop = _loop(target, code, dots, working)
    figures = Figures(
        registers=registers, spill_stores=stores, spill_loads=loads, spilled=spilled, stack=stack, shared=shared,
        shared_limit=target.shared_bytes, warps=warps, occupancy=occupancy(target, warps, registers, shared),
        instructions=len(code), mma=_mma(target, code), loads=_loads(target, code)[0], dots=dots, loop=loop,
        specialized=specialized,
    )  # fmt: skip
    return replace(figures, problems=problems(target, figures))


def problems(target: GpuTarget, figures: Figures) -> tuple[str, ...]:
    """What is wrong with the kernel on this target, in words; empty: nothing."""
    found: list[str] = []
    if figures.shared > figures.shared_limit:
        found.append(f"shared memory {figures.shared} B is over the limit of {figures.shared_limit} B")
    if figures.spill_stores or figures.spill_loads or figures.spilled:
        found.append(f"spills: {figures.spill_stores} stores, {figures.spill_loads} loads, {figures.stack} B a lane")
    if figures.dots and not figures.mma and _has_units(target, figures.dots.dtype):
        found.append(f"no matrix instruction for {figures.dots.dtype}")
    if figures.loop and figures.loop.narrow:
        found.append(f"{figures.loop.narrow} loads under {_WIDE} B in the hot loop")
    return tuple(found)


def _has_units(target: GpuTarget, dtype: str) -> bool:
    """Whether the target multiplies this element type in its matrix units."""
    if dtype in ("bf16", "f16"):
        return dtype == "f16" or target.can("bf16")
    return dtype.startswith("f8") and target.can("fp8") and target.name != "sm_89"


def _machine(target: GpuTarget, texts: Mapping[str, str]) -> tuple[tuple[Instruction, ...], int, int, int]:
    """(code, registers a lane, spilled registers, bytes of local memory a lane)."""
    if target.backend == "cuda":
        use = sass.parse_usage(texts["usage"])
        return sass.parse_sass(texts["sass"]), use.registers, 0, use.stack
    amd = amdgcn.parse_usage(texts["amdgcn"])
    return amdgcn.parse_amdgcn(texts["amdgcn"]), amd.registers, amd.spilled, amd.scratch


def source_dots(ttir: str) -> Dots | None:
    """The products of the innermost loop (most work first) in Triton's IR; None where there are none."""
    groups: dict[int, list[tuple[int, int, int, str]]] = {}
    loops: list[int] = []  # the line of each loop that is open, 0 for other regions
    for number, line in enumerate(ttir.splitlines(), 1):
        found = _DOT.search(line)
        if found:
            loop = next((at for at in reversed(loops) if at), 0)
            groups.setdefault(loop, []).append((int(found[1]), int(found[5]), int(found[2]), found[3]))
        code = line.partition(" loc(")[0]
        closed = code.lstrip().startswith("}")
        if closed and loops:
            loops.pop()
        if code.rstrip().endswith("{"):
            loops.append(number if "scf.for" in code or "scf.while" in code else 0)
    if not groups:
        return None
    work = {loop: sum(2.0 * m * n * k for m, n, k, _ in dots) for loop, dots in groups.items()}
    loop = max(groups, key=lambda at: (at > 0, work[at]))
    m, n, k, dtype = max(groups[loop], key=lambda dot: dot[0] * dot[1] * dot[2])
    return Dots((m, n, k), work[loop], dtype, loop > 0)


def _warps(ttgir: str, num_warps: int) -> tuple[int, int]:
    """(warps of a block, those that multiply): specialised kernels have warps that only copy."""
    total = re.search(r'"ttg\.total-num-warps" = (\d+)', ttgir)
    regions = re.split(r"\b(?=partition\d+\(|default \{)", ttgir.partition("ttg.warp_specialize")[2])
    working = 0
    for region in regions:
        if re.search(r"\bttng\.(?:warp_group_dot|tc_gen5_mma)\b|\btt\.dot\b", region):
            count = re.match(r"partition\d+\(.*?num_warps\((\d+)\)", region, re.DOTALL)
            working += int(count[1]) if count else num_warps
    return int(total[1]) if total else num_warps, working or num_warps


def _mma(target: GpuTarget, code: Sequence[Instruction]) -> dict[str, int]:
    return dict(Counter(_short(one.mnemonic) for one in code if _work(target, one, (128, 128, 64))[0]))


def _short(mnemonic: str) -> str:
    """HGMMA.64x256x16.F32.BF16 → HGMMA.64x256x16."""
    parts = mnemonic.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1][:1].isdigit() else parts[0]


def _work(target: GpuTarget, one: Instruction, dot: tuple[int, int, int]) -> tuple[float, bool]:
    return (
        sass.matrix_work(one.mnemonic, dot) if target.backend == "cuda" else (amdgcn.matrix_work(one.mnemonic), False)
    )


def _loads(target: GpuTarget, code: Sequence[Instruction]) -> tuple[dict[str, int], int]:
    reader = sass if target.backend == "cuda" else amdgcn
    found = [load for load in map(reader.load_width, code) if load]
    return dict(Counter(name for name, _ in found)), sum(width < _WIDE for _, width in found)


def _loop(target: GpuTarget, code: Sequence[Instruction], dots: Dots | None, working: int) -> Loop | None:
    if dots is None:
        return None
    reader = sass if target.backend == "cuda" else amdgcn
    all_work = {i: _work(target, one, dots.shape) for i, one in enumerate(code)}
    each = {i: work if block else work * working for i, (work, block) in all_work.items() if work}
    turn = hot_loop(code, each)
    if turn is None:
        return None
    body = [code[i] for i in turn]
    loads, narrow = _loads(target, body)
    steps = sum(each.get(i, 0.0) for i in turn) / dots.operations
    return Loop(
        instructions=len(body), steps=round(steps, 3), mma=_mma(target, body), loads=loads, narrow=narrow,
        shared_loads=reader.shared_loads(body), barriers=reader.barriers(body), local=sum(reader.local_traffic(body)),
    )  # fmt: skip
