"""What a call costs the host before a GPU has its kernels: microseconds of an op, and of one launch. No GPU.

    python benchmarks/host_time.py

Tensors lie in the host's memory and NVIDIA's driver is a library of empty functions (`benchmarks/host`, built here with
a C and a C++ compiler); all else is what runs on a GPU: torch's dispatcher, moec's ops, Triton's launcher, its kernels.
Of many short rounds the fastest counts, since other work on the machine only adds.
"""

import argparse
import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

HERE = Path(__file__).resolve().parent
CALL = 10  # calls a round
CASES = {  # T, stacked, router
    "decode, one token": (1, True, True),
    "decode, a module an expert": (1, False, True),
    "64 tokens": (64, True, True),
    "64 tokens, routing is the model's own": (64, True, False),
}
H, F, E, K = 256, 128, 128, 8
DEVICE = torch.device("cuda", 0)


def stand_ins(folder: Path) -> None:
    """A torch and a Triton that take this machine for one with an H100."""
    home, fast = Path(torch.__file__).parent, ["-O1", "-shared", "-fPIC"]
    includes = [f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include"]
    tensors, driver = folder / "tensors.so", folder / "libcuda.so.1"
    links = [f"-L{home}/lib", "-lc10", "-ltorch_cpu"]
    cxx, cc = os.environ.get("CXX", "g++"), os.environ.get("CC", "gcc")
    source = str(HERE / "host" / "tensors.cpp")
    subprocess.run([cxx, "-std=c++20", *fast, source, *includes, *links, "-o", str(tensors)], check=True)
    soname = "-Wl,-soname,libcuda.so.1"
    subprocess.run([cc, *fast, soname, str(HERE / "host" / "libcuda.c"), "-o", str(driver)], check=True)
    (folder / "libcuda.so").symlink_to(driver)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    for library in (tensors, driver):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    figures = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=227 << 10, gcnArchName="", name="H100",
    )  # fmt: skip
    done = SimpleNamespace(record=lambda stream: None, query=lambda: True)
    cuda = {
        "_lazy_init": lambda: None, "current_device": lambda: 0, "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device: figures, "is_current_stream_capturing": lambda: False,
        "current_stream": lambda device=None: None, "Event": lambda: done,
        "stream": lambda stream: contextlib.nullcontext(), "device": lambda device: contextlib.nullcontext(),
    }  # fmt: skip
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch._foreach_add_ = lambda tensors, numbers: None  # writes tables of addresses

    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver as active

    active.set_active(CudaDriver())


def call_of(tokens: int, stacked: bool, router: bool) -> tuple[Callable[[], object], str]:
    """A call of the layer's op over tensors that stay, and its spec."""
    import moec.runtime.ops  # noqa: F401  # registers the ops
    from moec.ir.spec import ExpertsSpec, KernelSpec, RouterSpec

    spec = KernelSpec(ExpertsSpec("bf16", stacked=stacked), RouterSpec(renormalize=True) if router else None, "bf16")
    shapes = [spec.experts.shape(group, H, F) for group in spec.experts.param_groups]

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    params = [made(E, *s) for s in shapes] if stacked else [made(*s) for s in shapes for _ in range(E)]
    x, text = made(tokens, H), str(spec)
    if router:
        routers = [made(E, H)]
        return lambda: torch.ops.moec.moe(x, routers, params, K, text, "auto"), text
    weights, experts = made(tokens, K, dtype=torch.float32), made(tokens, K, dtype=torch.int64)
    return lambda: torch.ops.moec.experts(x, weights, experts, params, text, "auto"), text


def microseconds(call: Callable[[], object], rounds: int) -> float:
    call()
    return min(timeit.repeat(call, number=CALL, repeat=rounds)) / CALL * 1e6


def one_launch(rounds: int) -> tuple[float, float]:
    """Microseconds of one launch of the first product at 64 tokens: Triton's own, and by addresses."""
    from moec.ir.dtypes import TRITON
    from moec.runtime.triton import load_triton

    call, text = call_of(*CASES["64 tokens"])
    call()
    *_, (built, _) = load_triton(text, DEVICE, "ordered", "pointers")._ready.values()
    at = [launch.kernel for launch in built.program.launches].index("gate_up")
    launch, step = built.program.launches[at], built.compiled._variants[frozenset()][at]
    dtypes = [TRITON[a.type[1:]] for a in launch.arguments[: len(launch.pointers)]]
    tensors = [torch.empty(1, dtype=dtype, device=DEVICE) for dtype in dtypes]
    addresses = {name: tensor.data_ptr() for name, tensor in zip(launch.pointers, tensors, strict=True)}
    theirs = getattr(built.module, launch.kernel)[launch.grid]
    return (
        microseconds(lambda: theirs(*tensors, *step.rest, **launch.options()), rounds),
        microseconds(lambda: step.start(addresses, 0, False), rounds),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400, help="rounds of ten calls; the fastest counts")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        stand_ins(Path(folder))
        for name, case in CASES.items():
            print(f"{name}: {microseconds(call_of(*case)[0], args.rounds):.0f} µs a call", flush=True)
        theirs, ours = one_launch(args.rounds)
        print(f"one launch of the first product: {theirs:.1f} µs by Triton's launch, {ours:.1f} µs by addresses")
    return 0


if __name__ == "__main__":
    sys.exit(main())
