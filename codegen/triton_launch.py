"""The launches of one call: kernels, grids, arguments and buffers as values, for running and for offline compilation.

A spec's Triton module (`moec.codegen.triton_emit.emit(spec)`) holds the kernels; this file says which of them run, in
which order, over which grid, with which arguments. `moec.runtime.triton` executes it; to compile it without a GPU:

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    module = triton_emit.load(spec)                                  # a Python module, cached on disk
    for launch in launches(spec, Sizes(T, H, F, E, k), config):      # config: default_config(spec, sizes, target)
        fn = getattr(module, launch.kernel)                          # a triton.JITFunction
        source = ASTSource(fn, launch.signature(), launch.constexprs(), launch.attrs())
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options())

`launches` describes contiguous tensors unless it is given `Operands`. Which entry runs (`moe` with the router, or
`experts` without) follows from the spec, unless named. Pointers are described as 16-byte aligned, as PyTorch allocates.

Letters: T tokens, H hidden, F expert width, E experts, k experts a token; a pair is one (token, slot).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from moec.codegen.plan import Sizes
from moec.codegen.triton_call import (
    WIDE,
    Argument,
    At,
    Buffer,
    Launch,
    Program,
    at,
    ceil_div,
    constants,
    depth_of_step,
    gemm_consts,
    lanes,
    param_arguments,
    permute,
    pointer,
    power_of_two,
    tile_buffers,
    tile_pointers,
)
from moec.codegen.triton_config import GpuConfig, default_config
from moec.codegen.triton_operands import Operands, contiguous
from moec.codegen.triton_route import (
    choice,
    choice_consts,
    router_bias,
    router_consts,
    router_operands,
    routing,
    routing_buffers,
)
from moec.codegen.triton_views import undescribable
from moec.errors import CodegenError
from moec.ir.bounds import TOKENS, Size, most, plain_bound, tokens_to_try
from moec.ir.spec import KernelSpec

ALIGNED = 256
"""Bytes that buffers in one block begin at multiples of."""
_DOWN_NUMBERS = 2048  # of its matrix that a block of decode_down reads at once: on an H100 no other number was faster


def launches(
    spec: KernelSpec, sizes: Sizes, config: GpuConfig, operands: Operands | None = None, entry: str | None = None
) -> tuple[Launch, ...]:
    """The launches of one forward call, in order. Raises CodegenError for sizes or values that no kernel takes."""
    return program(spec, sizes, config, operands, entry).launches


@lru_cache(maxsize=4096)
def program(
    spec: KernelSpec,
    sizes: Sizes,
    config: GpuConfig,
    operands: Operands | None = None,
    entry: str | None = None,
    capacity: int | None = None,
    save: bool = False,
) -> Program:
    """The launches and buffers of one forward call; `entry` is moe (router and experts) or experts.

    `capacity` bounds the rows that one expert gets, and with them grids and buffers: pairs beyond it have no expert.
    `save`: the call is given a tensor `saved`[T·k, F or 2F] for what φ reads; only where pairs are sorted.
    """
    made = at(spec, sizes, config, operands, entry, capacity, save)
    if save and config.variant == "decode":
        raise CodegenError("variant='decode' keeps nothing for a backward pass; use variant='sorted'")
    return _decode(made) if config.variant == "decode" else _sorted(made)


def _sorted(at: At) -> Program:
    reason = undescribable(at.spec, at.sizes, at.config, at.operands) if at.config.weights == "descriptors" else None
    if reason:
        raise CodegenError(f"weights='descriptors': {reason}; use weights='pointers'")
    steps = [*routing(at), *((permute(at),) if at.config.specialized else ()), _gate_up(at)]
    if at.spec.experts.out:
        steps.append(_down(at))
    if at.config.combine == "separate" or not at.spec.experts.out:
        steps.append(_combine(at))
    return Program(tuple(steps), buffers(at), at.config.weights == "descriptors")


def buffers(at: At) -> tuple[Buffer, ...]:
    """What the launches share; T may be a symbol."""
    s, dtype = at.sizes, at.spec.experts.dtype
    h = Buffer(_hidden(at), dtype, (at.pairs, s.F))
    if at.config.variant == "decode":
        return (h,)
    slots = Buffer("slots", "f32", (s.T, s.O), zeros=True) if at.atomic else Buffer("slots", dtype, (at.pairs, s.O))
    rows = (Buffer("rows", dtype, (at.rows, s.H)),) if at.config.specialized else ()
    between = (replace(h, shape=(at.rows, s.F)),) if at.spec.experts.out else ()
    return (*routing_buffers(at), *tile_buffers(at), *between, slots, *rows)


def _hidden(at: At) -> str:
    """Where φ's results go: without a second product they are the slots."""
    return "h" if at.spec.experts.out else "slots"


def buffer_formula(
    spec: KernelSpec,
    sizes: Sizes,
    routed: bool,
    config_for: Callable[[Sizes], GpuConfig] | None = None,
    capacity: Size | None = None,
) -> Size:
    """A bound on the bytes of `program(…).buffers` in T, one behind the other, for every T up to `sizes.T`.

    `config_for`: the configuration of a call, the default one without. `capacity`: the most rows of an expert in T.
    """
    tries = [replace(sizes, T=tokens) for tokens in tokens_to_try(sizes.T)]
    configs = [config_for(at) if config_for else default_config(spec, at) for at in tries]
    small = min(config.block_m for config in configs)  # the smaller the tiles, the more of them
    shapes = {(config.combine == "atomic", config.specialized): config for config in configs}
    totals: list[Size] = []
    for config in shapes.values():
        one = replace(config, block_m=small, variant="sorted")
        at = At(spec, replace(sizes, T=TOKENS), one, contiguous(spec, sizes), routed, capacity)
        parts = buffers(at)
        totals.append(plain_bound(sum(buffer.bytes for buffer in parts)) + ALIGNED * len(parts))
    return most(*totals)


def _decode(at: At) -> Program:
    steps = [_decode_gate_up(at), _decode_down(at) if at.spec.experts.out else _combine(at)]
    if at.routed:
        steps.insert(0, _decode_logits(at))
    return Program(tuple(steps), buffers(at))


def _schedule(at: At) -> dict[str, int | bool]:
    c = at.config
    return {
        "DESCRIBED": c.weights == "descriptors", "ORDERED": c.specialized, "PROGRAMS": c.programs,
        "SPECIALIZED": c.specialized,
    }  # fmt: skip


def _blocks(at: At, tiles: int) -> int:
    return min(tiles, at.config.programs) if at.config.programs else tiles


def _gate_up(at: At) -> Launch:
    s, c, o = at.sizes, at.config, at.operands
    pointers, strides = param_arguments(at, True)
    ours = [g for g in at.spec.experts.param_groups if g in ("a", "b", "ab")]
    n_tiles = ceil_div(at.columns, c.block_n)
    on_input = at.spec.experts.weight_on == "input"
    weights = (pointer("weights", o.weights_dtype),) if on_input else ()
    consts = constants(
        H=s.H, F=s.F, E=s.E, K=s.k, stride_x_t=o.x_strides[0], stride_x_h=o.x_strides[1], **strides,
        **gemm_consts(at, s.H), EVEN_N=at.columns % c.block_n == 0, WIDE_X=at.wide_x, WIDE_W=at.wide_w(*ours),
        SAVE=at.save, **_schedule(at),
    )  # fmt: skip
    x = replace(pointer("x", at.spec.experts.dtype), binding="rows") if c.specialized else pointer("x", o.x_dtype)
    arguments = (
        x, *weights, *pointers, *tile_pointers(at), replace(pointer("h", at.spec.experts.dtype), binding=_hidden(at)),
        replace(pointer("saved", at.spec.experts.dtype), binding="saved" if at.save else _hidden(at)),
        Argument("m_tiles", "i32", at.m_tiles), *consts,
    )  # fmt: skip
    return Launch("gate_up", (_blocks(at, at.m_tiles * n_tiles),), arguments, c.num_warps, c.num_stages)


def _combine_shape(at: At) -> tuple[int, int, int]:
    """Tokens and columns of a block that adds slots, and how many such blocks there are."""
    columns = min(256, power_of_two(at.sizes.O))
    tokens = min(max(1, 32 * 128 // columns), power_of_two(at.sizes.T))
    return tokens, columns, ceil_div(at.sizes.T, tokens) * ceil_div(at.sizes.O, columns)


def _combined(at: At) -> tuple[tuple[Argument, ...], dict[str, int | bool]]:
    """The arguments that adding slots takes."""
    o = at.operands
    weights = (pointer("weights", o.weights_dtype),) if at.spec.experts.weight_on == "output" else ()
    tokens, columns, _ = _combine_shape(at)
    numbers: dict[str, int | bool] = {"O": at.sizes.O, "E": at.sizes.E, "K": at.sizes.k}
    blocks: dict[str, int | bool] = {"BLOCK_TOKENS": tokens, "BLOCK_COLUMNS": columns, "ATOMIC": at.atomic}
    return (pointer("experts", "i64"), *weights, pointer("y", at.spec.y_dtype)), {**numbers, **blocks}


def _down(at: At) -> Launch:
    s, c = at.sizes, at.config
    pointers, strides = param_arguments(at, False)
    n_tiles = ceil_div(s.O, c.block_n)
    fused = c.combine in ("fused", "atomic")
    extra, numbers = _combined(at)
    consts = constants(
        **numbers, F=s.F, **strides, **gemm_consts(at, s.F), EVEN_N=s.O % c.block_n == 0,
        WIDE_H=at.pairs * s.F >= WIDE, WIDE_W=at.wide_w("out"), FUSED=fused, **_schedule(at), LANES=lanes(c.num_warps),
    )  # fmt: skip
    dtype = at.spec.experts.dtype
    arguments = (
        pointer("h", dtype), *pointers, *tile_pointers(at), pointer("slots", "f32" if at.atomic else dtype), *extra,
        Argument("T", "i32", s.T), Argument("m_tiles", "i32", at.m_tiles), *consts,
    )  # fmt: skip
    blocks = at.m_tiles * n_tiles + (_combine_shape(at)[2] if fused else 0)
    return Launch("down", (_blocks(at, blocks),), arguments, c.num_warps, c.num_stages)


def _combine(at: At) -> Launch:
    extra, numbers = _combined(at)
    dtype = at.spec.experts.dtype
    arguments = (pointer("slots", dtype), *extra, Argument("T", "i32", at.sizes.T), *constants(**numbers))
    return Launch("combine", (_combine_shape(at)[2],), arguments, 4, 1)


def _decode_logits(at: At) -> Launch:
    s = at.sizes
    block_h = min(2048, max(64, power_of_two(s.H)))
    assert at.spec.router is not None
    consts = constants(**router_consts(at), BLOCK_E=1, BLOCK_H=block_h, WIDE_ROUTER=at.wide_router)
    pointers = (*router_operands(at), *router_bias(at), pointer("logits", at.spec.router.compute))
    return Launch("decode_logits", (s.E, s.T), (*pointers, *consts), 8, 1)


def _step_of_rows(at: At, depth: int, most: int) -> int:
    """Numbers of a row that one step reads, `most` at most."""
    step = depth_of_step(at, depth, max(16, most))
    while step > 128 and depth % step:  # lanes beyond the last column would load nothing
        step //= 2
    return step


def _decode_gate_up(at: At) -> Launch:
    s, c, o = at.sizes, at.config, at.operands
    pointers, strides = param_arguments(at, True)
    chooser: tuple[Argument, ...]
    if at.routed:
        chooser, numbers = choice(at), choice_consts(at)
    else:
        weights = (pointer("weights", o.weights_dtype),) if at.spec.experts.weight_on == "input" else ()
        chooser, numbers = (*weights, pointer("experts", "i64")), {"K": s.k}
    consts = constants(
        H=s.H, F=s.F, E=s.E, **numbers, stride_x_t=o.x_strides[0], stride_x_h=o.x_strides[1], **strides,
        BLOCK_N=c.block_n, BLOCK_K=_step_of_rows(at, s.H, c.block_k), STAGES=c.num_stages,
    )  # fmt: skip
    kernel = "decode_route_gate_up" if at.routed else "decode_gate_up"
    h = replace(pointer("h", at.spec.experts.dtype), binding=_hidden(at))
    grid = (ceil_div(s.F, c.block_n), s.k, s.T)
    return Launch(kernel, grid, (pointer("x", o.x_dtype), *chooser, *pointers, h, *consts), c.num_warps, 1)


def _decode_down(at: At) -> Launch:
    s = at.sizes
    pointers, strides = param_arguments(at, False)
    weights = (pointer("weights", at.operands.weights_dtype),) if at.spec.experts.weight_on == "output" else ()
    slots = power_of_two(s.k)
    block_n = 1 if strides["stride_out_k"] == 1 else 16  # rows as they lie, or the parts of lines that lie together
    consts = constants(
        O=s.O, F=s.F, E=s.E, K=s.k, **strides, SLOTS=slots, BLOCK_N=block_n,
        BLOCK_K=_step_of_rows(at, s.F, _DOWN_NUMBERS // (slots * block_n)),
    )  # fmt: skip
    arguments = (
        pointer("h", at.spec.experts.dtype), *weights, pointer("experts", "i64"), *pointers,
        pointer("y", at.spec.y_dtype), *consts,
    )  # fmt: skip
    return Launch("decode_down", (ceil_div(s.O, block_n), s.T), arguments, 4, 1)
