"""What is not MoE goes to the compiler that the options name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import fx
from torch.compiler import config as compiler_config

from moec.options import Rest
from moec.passes.raising.raise_graph import fake
from moec.proof.store import source_hash
from moec.target import Target

Compiled = Callable[..., Any]


def compile_rest(gm: fx.GraphModule, example_inputs: Sequence[Any], rest: Rest, mode: str | None) -> Compiled:
    """The graph as something to call. `mode` is Inductor's, as `torch.compile` calls it.

    A graph that Inductor cannot compile is run by PyTorch, with one warning; where that is for want of a C++ compiler,
    which moec's kernels lack too, theirs says it.
    """
    inputs = list(example_inputs)
    if rest == "eager":
        return gm.forward
    if rest == "aot_eager" or (_on_cpu(gm) and not _has_compiler(silent=_kernels_will_say_so(gm))):
        return _by_pytorch(gm, inputs)
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.exc import InductorError

    patches = list_mode_options(mode) if mode not in (None, "default") else None
    try:
        with compiler_config.patch(cache_key_tag=_cache_tag()):  # pyright: ignore[reportAttributeAccessIssue]
            return cast(Compiled, compile_fx(gm, inputs, config_patches=patches))
    except InductorError as error:
        _warn_once(
            f"cannot compile it: {_in_one_line(error.inner_exception)}; where the C++ compiler is at fault, set CXX "
            "to a working g++ or clang++; options={'rest': 'aot_eager'} does without Inductor"
        )
        return _by_pytorch(gm, inputs)


def _by_pytorch(gm: fx.GraphModule, inputs: list[Any]) -> Compiled:
    return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)


def _cache_tag() -> str:
    """The user's own tag and moec's source: what torch keeps on disk knows ops by name, not how they differentiate."""
    return f"{compiler_config.cache_key_tag}moec-{source_hash()}"


def _on_cpu(gm: fx.GraphModule) -> bool:
    """Whether something of a graph is computed on the CPU; numbers may lie there in a graph for another device."""
    values = (fake(node) for node in gm.graph.nodes)
    return any(isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.ndim for value in values)


def _kernels_will_say_so(gm: fx.GraphModule) -> bool:
    """Whether moec's own ops will be called, and warn that there is no compiler."""
    return not Target.host().compiler and any(getattr(n.target, "namespace", "") == "moec" for n in gm.graph.nodes)


def _has_compiler(silent: bool) -> bool:
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()  # Inductor's own question, whose answer it keeps
    except (InvalidCxxCompiler, OSError):
        if not silent:
            _warn_once(
                f"cannot run its C++ compiler {str(config.cpp.cxx[-1])!r}; set CXX to the path of g++ or clang++ "
                "(Inductor takes no arguments), or choose options={'rest': 'aot_eager'}"
            )
        return False
    return True


@lru_cache(maxsize=16)
def _warn_once(why: str) -> None:
    warnings.warn(f"moec: what is not MoE runs in PyTorch, since Inductor {why}", RuntimeWarning, stacklevel=2)


def _in_one_line(error: BaseException) -> str:
    """The error with its first line that tells what is wrong: compilers' commands come before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["it says nothing"]
    named = [line for line in lines if "error:" in line]
    return f"{type(error).__name__}: {(named or lines)[0]}"
