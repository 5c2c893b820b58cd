"""Registers that do not suffice: every kernel of a layer, forward and backward, in its default configuration. No GPU.

    python benchmarks/spills.py                                 # three models, T of 1, 64 and 4096, four targets
    python benchmarks/spills.py --models Mixtral-8x7B --tokens 64 --targets sm_90 --only route,backward_hidden

Prints a line for each kernel that spills or is refused, and at the end how many were compiled.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from static import LAYER, MODELS, TOKENS

from moec.codegen import triton_emit
from moec.codegen.plan import Sizes
from moec.codegen.triton_backward import Wanted, backward_config, backward_program
from moec.codegen.triton_config import default_config
from moec.codegen.triton_operands import contiguous
from moec.gpu.offline import Refused, compile_offline
from moec.gpu.target import gpu_target
from moec.kernels.jobs import Request, kernel_jobs, launch_job, tensor_bytes
from moec.options import Environment

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def backward_jobs(sizes, target, saved):
    """(kernel, job) of each launch of the gradients of all that has one; `saved`: forward kept what φ reads."""
    spec = replace(LAYER, router=None)
    config = backward_config(default_config(spec, sizes, target))
    groups = tuple(spec.experts.param_groups)
    plan = backward_program(spec, sizes, config, contiguous(spec, sizes), Wanted(True, True, groups, saved))
    extents = tensor_bytes(spec, sizes)
    extents |= {f"d_{group}": extents[group] for group in groups} | {"grad": extents["y"], "dx": extents["x"]}
    extents |= {buffer.name: buffer.bytes for buffer in plan.buffers}
    source = triton_emit.emit_backward(spec)
    return [(launch.kernel, launch_job(source, launch, extents)) for launch in plan.launches]


def jobs(model, tokens, target):
    """(kernel, job) of each launch of a layer's training step; what forward keeps decides about some of them."""
    sizes = Sizes(T=tokens, **MODELS[model])
    forward = [(one.launch.kernel, one.job) for one in kernel_jobs(Request(LAYER, sizes, target))]
    found = [*forward, *backward_jobs(sizes, target, True), *backward_jobs(sizes, target, False)]
    given = kernel_jobs(Request(replace(LAYER, router=None), sizes, target))  # routing that is the model's own
    there = {name for name, _ in found}
    return [*found, *((one.launch.kernel, one.job) for one in given if one.launch.kernel not in there)]


def line(model, tokens, target, name, made):
    """What is wrong with a kernel, or nothing."""
    where = f"{target.name:7} {model:14} T={tokens:<5} {name:18}"
    if isinstance(made, Refused):
        return f"{where} refused: {made.reason}"
    f = made.figures
    spilled = f"{f.spill_stores} stores, {f.spill_loads} loads, {f.registers} registers"
    return f"{where} {spilled}" if f.spill_stores + f.spill_loads else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--only", default="", help="kernels, separated by commas")
    parser.add_argument("--jobs", type=int, default=2, help="kernels compiled at a time")
    args = parser.parse_args()
    wanted = set(args.only.split(",")) - {""}
    asked = [
        (model, int(tokens), gpu_target(target), name, job)
        for model in args.models.split(",")
        for tokens in args.tokens.split(",")
        for target in args.targets.split(",")
        for name, job in _distinct(jobs(model, int(tokens), gpu_target(target)), wanted)
    ]
    cache, spilled = Environment.read().cache_dir, 0

    def compiled(each):
        model, tokens, target, name, job = each
        return line(model, tokens, target, name, compile_offline(job, target, cache, 600))

    with ThreadPoolExecutor(args.jobs) as pool:
        for done, text in enumerate(pool.map(compiled, asked), start=1):
            print(f"\r{done} of {len(asked)}", end="", file=sys.stderr, flush=True)
            spilled += bool(text)
            if text:
                print(f"\r{text}", flush=True)
    print(f"\n{len(asked)} kernels, {spilled} that spill or are refused")
    return int(spilled > 0)


def _distinct(found, wanted):
    seen = []
    for name, job in found:
        if (not wanted or name in wanted) and (name, job) not in seen:
            seen.append((name, job))
    return seen


if __name__ == "__main__":
    sys.exit(main())
