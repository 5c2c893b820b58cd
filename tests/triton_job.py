"""A small grouped product in Triton, and jobs that compile it: for tests of what needs no GPU."""

from moec.gpu.offline import Job, Pointer

SOURCE = """
import triton
import triton.language as tl


@triton.jit
def grouped(x, w, y, rows, tile_expert, n_tiles, H: tl.constexpr, N: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m = tl.program_id(0)
    n = tl.program_id(1)
    if m >= n_tiles:
        return
    e = tl.load(tile_expert + m).to(tl.int64)
    r = tl.load(rows + m * BM + tl.arange(0, BM))
    k = tl.arange(0, BK)
    cols = n * BN + tl.arange(0, BN)
    xp = x + r[:, None] * H + k[None, :]
    wp = w + e * N * H + cols[None, :] * H + k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in tl.range(0, H // BK):
        acc = tl.dot(tl.load(xp), tl.load(wp), acc)
        xp += BK
        wp += BK
    at = (m * BM + tl.arange(0, BM))[:, None].to(tl.int64) * N + cols[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty))


@triton.jit
def wrong(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 1.0)


@triton.jit
def copy(x, y, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + i, tl.load(x + i))
"""


def grouped_job(dtype="bf16", tile=(128, 128, 64), num_warps=8, num_stages=3, weight_bytes=1 << 30):
    """The grouped product at H=4096, N=1024."""
    tensors = {name: Pointer(dtype, 1 << 24) for name in ("x", "w", "y")} | {"w": Pointer(dtype, weight_bytes)}
    indices = {name: Pointer("i32", 1 << 16) for name in ("rows", "tile_expert")}
    sizes = dict(zip(("BM", "BN", "BK"), tile, strict=True))
    arguments = {**tensors, **indices, "n_tiles": 17, "H": 4096, "N": 1024, **sizes}
    return Job(SOURCE, "grouped", arguments, num_warps, num_stages)
