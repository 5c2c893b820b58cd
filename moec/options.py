"""Options of `torch.compile(..., backend="moec", options={...})`, and the environment: the one place that reads it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_type_hints

from moec.errors import OptionError, ParseError
from moec.exchange.placement import read_placements
from moec.exchange.process_groups import group_named
from moec.ir.engine import Engine, Schedule, check_weights
from moec.ir.token_range import TokenRange

Kind = Literal["auto", "cpp", "triton", "eager"]
Rest = Literal["inductor", "aot_eager", "eager"]
Save = Literal["auto", "always", "never"]
Race = Literal["off", "on"]
Combine = Literal["ordered", "atomic"]
Proof = Literal["on", "strict", "off"]


@dataclass(frozen=True)
class Options:
    """What a user may choose. Defaults never change a model's results.

    kernels  auto: generated C++ on CPUs and Triton on GPUs where they can be built, else the eager twin;
             cpp, triton, eager: that engine
    rest     who compiles what is not MoE: inductor, aot_eager or eager
    verify   check the graph's invariants between passes
    proof    try each distinct rewrite on random and adversarial routings before it is used; strict: a layer whose
             rewrite cannot be tried is left as it is; off: rewrites are used as they are
    save_activations  in training, forward keeps each pair's projections for backward: auto (where the memory model
             says that it pays), always, never (computed again)
    keep_gradients  in training, memory of a parameter's gradient is used again for the next step's once nobody refers
             to it, until the parameter is gone; False: it is new memory in every step, given back in between
    race     on: at first use of a layer and a size, eager's form and a few plans are timed, the fastest is kept on disk
    freeze   inference only: kernels read a copy of the experts' weights, made once in the order in which they read;
             made anew when a parameter was changed
    weights  inference only: stored: as they are; bf16, int8 (a scale a channel), int8:N (a scale for N numbers of it),
             fp8 (Triton only: e4m3, a scale a matrix), fp8:N (a scale for N×N numbers of it): kernels read a copy in
             fewer bytes, which changes results by as much as the report says
    combine  how Triton kernels add the results of a token's experts: ordered (the same bits in every call) or atomic
             (less memory; the last bits may differ from call to call)
    schedule  how Triton's grouped products run: pointers; descriptors (TMA), persistent, specialized (warps): an error
             where the GPU lacks it
    tokens   the range of T, the number of tokens of a call: `1..4096`, or one number. Buffers are taken once, for the
             most; a call with more takes larger ones, with one warning. Empty: as the model's symbolic sizes say
             (`mark_dynamic(…, max=)`), else buffers grow to the largest call
    experts_over  a torch.distributed process group (`world`: all ranks) over whose ranks each layer's experts are
             spread: every rank calls the model with its own tokens, rows travel to the rank of their expert and back.
             Results are those of one rank; a rank's gradients are those of its own experts, from everyone's tokens
    placement  with experts_over: a JSON file that says which rank computes which expert; empty: blocks in order
    ranks_per_node  with experts_over: a row crosses nodes of that many ranks once a node; 0: straight to its rank
    fuel     stop after this many rewrites (-1: no limit); for finding the rewrite that changes an answer
    """

    kernels: Kind = "auto"
    rest: Rest = "inductor"
    verify: bool = True
    proof: Proof = "on"
    race: Race = "off"
    freeze: bool = False
    weights: str = "stored"
    combine: Combine = "ordered"
    schedule: Schedule = "pointers"
    tokens: str = ""
    experts_over: str = ""
    placement: str = ""
    ranks_per_node: int = 0
    fuel: int = -1
    save_activations: Save = "auto"
    keep_gradients: bool = True

    def engine(self, training: bool) -> Engine:
        """How the ops of a graph run. What is for inference only is left out of a graph that is trained."""
        if training:
            fresh = not self.keep_gradients
            return Engine(self.kernels, combine=self.combine, schedule=self.schedule, fresh=fresh, tokens=self.tokens)
        frozen = self.freeze and self.weights == "stored"
        weights = "packed" if frozen else self.weights
        return Engine(self.kernels, self.race == "on", weights, self.combine, self.schedule, tokens=self.tokens)

    @staticmethod
    def make(values: Mapping[str, Any] | None = None) -> Options:
        """Options from a user's dictionary; raises OptionError with the nearest valid name or value."""
        hints = get_type_hints(Options)
        if values is not None and not isinstance(cast(object, values), Mapping):
            raise OptionError(
                f"options={values!r} is {type(values).__name__}; expected a dictionary of option and value"
            )
        for name, value in (values or {}).items():
            if name not in hints:
                raise OptionError(
                    f"unknown option {name!r}{_nearest(str(name), hints)}; valid options: {', '.join(hints)}"
                    + (_INDUCTORS if "." in str(name) else "")
                )
            _check(name, value, hints[name])
            if name in _CHECKS:
                _CHECKS[name](value)
        options = Options(**(values or {}))
        _check_spread(options)
        return options


def _check(name: str, value: Any, hint: Any) -> None:
    choices = get_args(hint)
    if choices and value not in choices:
        raise OptionError(
            f"option {name}={value!r}{_nearest(str(value), choices)}; expected one of {', '.join(choices)}"
        )
    if not choices and type(value) is not hint:
        such = f" such as {_TEXTS[name]!r}" if name in _TEXTS else ""
        raise OptionError(f"option {name}={value!r} is {type(value).__name__}; expected {hint.__name__}{such}")


def _check_tokens(text: str) -> None:
    if text:
        try:
            TokenRange.parse(text)
        except ValueError as error:
            raise OptionError(f"option tokens={error}") from None


def _check_spread(options: Options) -> None:
    """What the options about ranks say together. Nothing is asked of the other ranks."""
    over, size = options.experts_over, options.ranks_per_node
    if not over:
        lone = [name for name in ("placement", "ranks_per_node") if getattr(options, name)]
        if lone:
            raise OptionError(f"option {lone[0]}={getattr(options, lone[0])!r}: of no use without experts_over; add it")
        return
    ranks = group_named(over).size()
    if size < 0 or (size and ranks % size):
        raise OptionError(f"option ranks_per_node={size}: the {ranks} ranks of {over!r} are no nodes of {size}")
    if options.proof == "strict":
        raise OptionError("option proof='strict': ranks could decide differently with experts_over; use proof='on'")
    if options.placement:
        _check_placement(Path(options.placement), ranks)


def _check_placement(path: Path, ranks: int) -> None:
    try:
        read = read_placements(path)
    except ParseError as error:
        raise OptionError(f"option placement={error}") from None
    if read.ranks != ranks:
        raise OptionError(f"option placement={str(path)!r}: made for {read.ranks} ranks, the group has {ranks}")


def _check_fuel(fuel: int) -> None:
    if fuel < -1:
        raise OptionError(f"option fuel={fuel}: expected a number of rewrites, or -1 for no limit")


def check_mode(mode: str | None) -> None:
    """Raise OptionError for a mode that torch.compile does not know, whatever the model leaves to Inductor."""
    if mode is not None and mode not in MODES:
        raise OptionError(f"mode={mode!r}{_nearest(str(mode), MODES)}; expected one of {', '.join(MODES)}")


MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""What Inductor makes of the rest, as `torch.compile` calls it."""

_INDUCTORS = "; Inductor's own are set by torch._inductor.config"

_CHECKS: Mapping[str, Callable[[Any], None]] = {
    "weights": check_weights,
    "tokens": _check_tokens,
    "fuel": _check_fuel,
}
"""Options that take more than their type says."""

_TEXTS = {"weights": "int8:128", "tokens": "1..4096", "experts_over": "world", "placement": "placement.json"}
"""Options whose value is text, each with one."""


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


@dataclass(frozen=True)
class Environment:
    """What moec reads from the process's environment.

    MOEC_CACHE_DIR  where built kernels are kept (default: the user's cache directory)
    MOEC_CPU_ISA    plain | avx2 | avx512 | avx512_bf16 | amx_bf16 | neon: this instruction set, not the host's best
    CXX             the C++ compiler (default: g++, then clang++, then c++)
    """

    cache_dir: Path
    cpu_isa: str | None
    cxx: str | None

    @staticmethod
    def read(env: Mapping[str, str] | None = None) -> Environment:
        """The environment as it is now; raises OptionError where it names no folder for a cache, as without a home."""
        env = os.environ if env is None else env
        return Environment(_cache_dir(env), env.get("MOEC_CPU_ISA") or None, env.get("CXX") or None)


def _cache_dir(env: Mapping[str, str]) -> Path:
    try:
        if env.get("MOEC_CACHE_DIR"):
            # A shell does that, a container's settings do not; and a loader looks elsewhere for what names no folder.
            return Path(env["MOEC_CACHE_DIR"]).expanduser().absolute()
        return Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moec"
    except RuntimeError as error:  # a container's user without an entry among the system's
        raise OptionError(f"no folder for built kernels: {error}; set MOEC_CACHE_DIR to a path") from error
