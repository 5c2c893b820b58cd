"""A generated CPU kernel as a Python object: built on demand, its arguments packed.

Letters: T tokens, H hidden, F expert width, O output width, E experts, k experts a token.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from moec.codegen.cpp import emit, header_texts
from moec.codegen.plan import Plan, Rows, make_plan
from moec.codegen.storage import Storage
from moec.codegen.tuning import Sizes, Tuning, default_tuning
from moec.errors import CodegenError
from moec.ir.dtypes import DTYPE_NAMES, DTYPES
from moec.ir.spec import KernelSpec, stored_dtypes
from moec.runtime import tune_cache
from moec.runtime.binding import Bindings, checked_sizes
from moec.runtime.calls import About, calls, kernel_library
from moec.runtime.nodes import ONE, words_of
from moec.target import Target

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ABSENT = (0, 0, 0, 0, 0)
_NO_ROUTER = (0,) * 8
_MATRICES = ("a", "b", "ab", "out")  # the groups of parameters that weigh


def kernel_source(spec: str) -> str:
    """The whole C++ of a spec's kernel for this host, its headers first, for people to read."""
    parsed = KernelSpec.parse(spec)
    unit = emit(parsed, Target.host(), parsed.experts.dtype)
    headers = "".join(f"// ===== {name}\n{text}\n" for name, text in header_texts())
    return f"{headers}// ===== the kernel\n{unit}"


def load_kernel(spec: str, router_dtype: torch.dtype | None, target: Target | None = None) -> Kernel:
    """The kernel of a spec for a router matrix stored in `router_dtype` (None: the spec's router is not used).

    Raises CodegenError where the spec has no C++ form, BuildError where it cannot be built.
    """
    return _load(spec, router_dtype, target or Target.host())


@lru_cache(maxsize=1024)
def _load(text: str, router_dtype: torch.dtype | None, target: Target) -> Kernel:
    spec = KernelSpec.parse(text)
    stored = "f32" if spec.router is None else router_storage(router_dtype or torch.float32, spec)
    return Kernel(spec, target, DTYPES[stored], kernel_library(emit(spec, target, stored), target))


def router_storage(dtype: torch.dtype, spec: KernelSpec) -> str:
    """The dtype in which a kernel reads the router's matrix: as stored, unless `compute` rounds it."""
    assert spec.router is not None
    name = DTYPE_NAMES.get(dtype, "f32")
    return name if spec.router.compute in ("f32", name) else spec.router.compute


@dataclass(frozen=True)
class Bound:
    """Parameters as words of `Args`, E, H, F, O, and what must outlive the call: pointer tables, and copies if any.

    `scales` are words too, of matrices that are kept as codes, and `nodes`, which say where memory is.
    """

    words: tuple[int, ...]
    E: int
    H: int
    F: int
    O: int
    alive: tuple[object, ...]
    copied: bool
    scales: tuple[int, ...] = (0,) * 15
    nodes: tuple[int, ...] = ONE


class Kernel:
    """One built kernel. Calls are thread-safe; tensors must be on the CPU."""

    def __init__(
        self,
        spec: KernelSpec,
        target: Target,
        router_dtype: torch.dtype,
        library: ctypes.CDLL,
        tuning: Tuning | None = None,
        waits: array[int] | None = None,
    ) -> None:
        self.spec, self.target, self.library, self.tuning = spec, target, library, tuning
        self._waits = waits
        self._router_dtype = router_dtype
        library.args_words.restype = ctypes.c_int64
        self._words = int(library.args_words())
        self._call_experts = self._function("experts")
        self._call_moe = self._function("moe") if spec.router else None
        self._bindings = bindings(spec)
        self._dtypes = lru_cache(maxsize=16)(lambda count: stored_dtypes(spec.experts, count))
        self._plan = lru_cache(maxsize=1024)(self._make_plan)  # cheaper to look up than make_plan itself

    def tuned(self, tuning: Tuning | None) -> Kernel:
        """The same kernel, all of whose plans have these numbers (None: the default's)."""
        return Kernel(self.spec, self.target, self._router_dtype, self.library, tuning)

    def watched(self, waits: array[int]) -> Kernel:
        """The same kernel, which adds to `waits` the nanoseconds that each thread waits for others; one a thread."""
        return Kernel(self.spec, self.target, self._router_dtype, self.library, self.tuning, waits)

    def _make_plan(
        self, sizes: tuple[int, int, int, int, int, int], dtype: torch.dtype, row: int, contiguous: bool, threads: int
    ) -> tuple[Plan, array[int]]:
        plan = self._plan_of(Sizes(*sizes), Rows(DTYPE_NAMES[dtype], row, contiguous), threads)
        return plan, array("q", plan.words)

    def _stored(self, sizes: Sizes, threads: int) -> Tuning | None:
        """What was measured to be fastest here, or for the nearest sizes; None: nothing was, or the default is."""
        entries = tune_cache.load()
        if not entries:
            return None
        found = tune_cache.nearest(self.key(sizes, threads), self.made, entries)
        tuning = found.tuning if found else None
        chunk = default_tuning(self.spec, sizes, self.target, threads).chunk  # memory, which no other sizes can say
        return replace(tuning, chunk=chunk) if tuning else None

    def sizes(self, x: Tensor, params: Sequence[Tensor], k: int) -> Sizes:
        """The sizes of a call."""
        bound = self._bound(params)
        return Sizes(x.shape[0], bound.H, bound.F, bound.E, k, bound.O)

    def key(self, sizes: Sizes, threads: int) -> tune_cache.Key:
        """What a measurement of this kernel at these sizes is kept under."""
        return tune_cache.Key.of(self.spec, sizes, threads, self.target.isa)

    def _plan_of(self, sizes: Sizes, x: Rows, threads: int) -> Plan:
        """The plan of a call, with the numbers given, those that were measured, or the default's."""
        tuning = self.tuning or self._stored(sizes, threads)
        return make_plan(self.spec, sizes, x, self.target, threads, tuning)

    def storage(self) -> Storage | None:
        """How this kernel's own copy of the weights lies; None where it reads the user's."""
        return None

    @property
    def made(self) -> tune_cache.Made:
        """Where and from what this kernel was built."""
        return tune_cache.made_here(str(self.spec), self.target)

    def _bound(self, params: Sequence[Tensor]) -> Bound:
        return self._bindings.of(params)

    def _function(self, name: str) -> ctypes._NamedFuncPointer:
        function = getattr(self.library, name)
        function.restype, function.argtypes = None, [ctypes.c_void_p]
        return function

    def takes(self, x: Tensor, params: Sequence[Tensor]) -> bool:
        """Whether the dtypes are those of the spec; others (float64, say) are the twin's."""
        return x.dtype in CODES and [p.dtype for p in params] == self._dtypes(len(params))

    def experts(
        self,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        params: Sequence[Tensor],
        saved: Tensor | None = None,
        again: Again | None = None,
    ) -> Tensor:
        """x[T, H] of any strides, weights[T, k], experts[T, k] → y[T, O].

        `saved`[T·k, F or 2F] in the parameters' dtype is given the projections of each pair: a, then b.
        """
        bound = self._bound(params)
        y = self._empty(x, bound)
        if x.numel() == 0 or experts.shape[1] == 0:
            return y.zero_()
        given = (weights, experts)
        if weights.dtype not in CODES:
            weights = weights.float()
        weights, experts = weights.contiguous(), experts.to(torch.int64).contiguous()
        again = again if _same((weights, experts), given) else None
        self._run(self._call_experts, _Tensors(x, y, weights, experts, saved=saved), bound, _NO_ROUTER, again)
        return y

    def moe(
        self, x: Tensor, router: Sequence[Tensor], params: Sequence[Tensor], k: int, again: Again | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x[T, H] of any strides, router W[E, H] and its biases → y[T, O], logits[T, E], weights[T, k], experts."""
        r = self.spec.router
        if r is None or self._call_moe is None:
            raise CodegenError(f"moec::moe needs a spec with a router, got {str(self.spec)!r}; call moec::experts")
        tokens, count = x.shape[0], router[0].shape[0]
        if not 0 < k <= count:
            raise CodegenError(f"k={k} experts a token of E={count}: expected 1 ≤ k ≤ E")
        bound = self._bound(params)
        if count != bound.E:  # the kernel would read and write past the end
            raise CodegenError(f"the router has {count} outputs, but there are E={bound.E} experts")
        y = self._empty(x, bound)
        logits = x.new_empty((tokens, count), dtype=DTYPES[r.compute])
        weights = x.new_empty((tokens, k), dtype=DTYPES[r.weight_dtype])
        experts = x.new_empty((tokens, k), dtype=torch.int64)
        if x.numel() == 0:
            return y, logits, weights, experts
        w = router[0].to(self._router_dtype)
        w = w if w.stride(1) == 1 else w.contiguous()
        rest = [b if b.dtype in CODES and b.is_contiguous() else b.float().contiguous() for b in router[1:]]
        again = again if _same((w, *rest), router) else None
        bias = rest.pop(0) if r.bias else None
        selection = rest.pop(0) if r.selection_bias else None
        words = (w.data_ptr(), CODES[w.dtype], w.stride(0), 1, *_vector(bias), *_vector(selection))
        self._run(self._call_moe, _Tensors(x, y, weights, experts, logits), bound, words, again)
        return y, logits, weights, experts

    def _empty(self, x: Tensor, bound: Bound) -> Tensor:
        """Room for y."""
        return x.new_empty((x.shape[0], bound.O), dtype=DTYPES[self.spec.y_dtype])

    def _run(
        self,
        function: ctypes._NamedFuncPointer,
        t: _Tensors,
        bound: Bound,
        router: tuple[int, ...],
        again: Again | None,
    ) -> None:
        x, logits = t.x, t.logits
        row, column = x.stride()
        tokens, hidden = x.shape
        if hidden != bound.H:
            raise CodegenError(f"x is {list(x.shape)}, but the experts' parameters want [T, {bound.H}]")
        sizes = (tokens, hidden, bound.F, bound.E, t.experts.shape[1], bound.O)
        plan, words = self._plan(sizes, x.dtype, row, column == 1, torch.get_num_threads())
        size = max(plan.workspace_bytes, again.reserved) if again else plan.workspace_bytes
        words, at = words[:], len(words)
        words.extend((calls().workspace(size), x.data_ptr(), CODES[x.dtype], row, column, t.y.data_ptr()))
        words.extend((t.experts.data_ptr(), t.weights.data_ptr(), CODES[t.weights.dtype], *bound.words))
        words.extend((_address(t.saved), _address(logits)))
        words.extend(router)
        words.append(self._waits.buffer_info()[0] if self._waits is not None else 0)
        words.extend(bound.scales)
        words.extend(bound.nodes)
        if len(words) != self._words:
            raise AssertionError(f"a kernel takes {self._words} words, got {len(words)}")
        function(words.buffer_info()[0])
        if again and not bound.copied:
            y, weights = CODES[t.y.dtype], CODES[t.weights.dtype]
            routed = 0 if logits is None else CODES[logits.dtype]
            places = (at, at + 1, at + 5, at + 6, at + 7, at + 10 + len(bound.words))
            about = About(size, *places, y, weights, routed, bound.O, bound.E)
            address = ctypes.cast(function, ctypes.c_void_p).value
            calls().remember(address or 0, words, about, (self, bound))


@dataclass(frozen=True)
class Again:
    """That a call may be made again without Python where it is the same but for x; `reserved`: bytes of workspace that
    it takes at least."""

    reserved: int = 0


@dataclass(frozen=True)
class _Tensors:
    """A call's own: x, results (y, and the router's in `moe`), and what is kept for the backward pass."""

    x: Tensor
    y: Tensor
    weights: Tensor
    experts: Tensor
    logits: Tensor | None = None
    saved: Tensor | None = None


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _same(used: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
    """Whether kernels read the very tensors that a call was given, no copies of them."""
    return all(a is b for a, b in zip(used, given, strict=True))


def _vector(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.data_ptr(), CODES[t.dtype])


def bindings(spec: KernelSpec) -> Bindings[Bound]:
    """Where parameters of `spec` lie; copies are made anew for each call."""
    return Bindings(spec.experts, lambda params: bind(spec, params), lambda bound: not bound.copied)


def bind(spec: KernelSpec, params: Sequence[Tensor]) -> Bound:
    """Where each parameter group lies: a base and a stride when stacked, a table of pointers when not."""
    s = spec.experts
    groups = s.param_groups
    alive: list[object] = []
    found: dict[str, tuple[int, ...]] = {}
    experts, hidden, width, wide = checked_sizes(s, params)
    count = 1 if s.stacked else experts
    for i, group in enumerate(groups):
        found[group] = _group(params[i * count : (i + 1) * count], s.stacked, alive)
    a, b = _pair(found, "", s.gate, width * params[0].element_size(), s.layout_in == "nk")
    bias_a, bias_b = _pair(found, "bias_", s.gate, width * DTYPES[s.stored("bias_ab")].itemsize, False)
    words = (*a, *b, *found.get("out", ABSENT), *bias_a, *bias_b, *found.get("bias_out", ABSENT))
    # Scales of a tensor that a and b share are told by the output's number, not by where b's begin.
    scale_a, scale_b = _pair(found, "scale_", s.gate, 0, False)
    scales = (*scale_a, *scale_b, *found.get("scale_out", ABSENT))
    copied = any(isinstance(a, list) for a in alive)
    kinds = (params[i * count : (i + 1) * count] for i, group in enumerate(groups) if group in _MATRICES)
    nodes = words_of(list(kinds), alive)
    return Bound(words, experts, hidden, width, wide, tuple(alive), copied, scales, nodes)


def _group(tensors: Sequence[Tensor], stacked: bool, alive: list[object]) -> tuple[int, ...]:
    """(base, stride in bytes, table, offset, row stride) of one parameter group."""
    first = tensors[0]
    inner, ld = first.stride(-1), first.stride(-2) if first.dim() > (2 if stacked else 1) else 0
    same = stacked or all(t.stride() == first.stride() for t in tensors)
    if inner != 1 or not same:
        tensors = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
        alive.append(tensors)
        return _group(tensors, stacked, alive)
    if stacked:
        return (first.data_ptr(), first.stride(0) * first.element_size(), 0, 0, ld)
    table = array("q", [t.data_ptr() for t in tensors])
    alive.append(table)
    return (0, 0, table.buffer_info()[0], 0, ld)


def _pair(
    found: dict[str, tuple[int, ...]], prefix: str, gate: str, part: int, by_row: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a's and b's parts begin: in a shared tensor b's `part` bytes on, or where `by_row` as many rows of it."""
    if gate == "separate":
        return found.get(f"{prefix}a", ABSENT), found.get(f"{prefix}b", ABSENT)
    a = found.get(f"{prefix}ab", ABSENT)
    if gate != "concat" or a == ABSENT:
        return a, ABSENT
    base, stride, table, _, ld = a
    return a, (base, stride, table, part * (ld if by_row else 1), ld)
