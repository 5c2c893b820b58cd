"""The process that compiles one kernel for a GPU that need not be there: job.json in a folder → machine code beside.

Run as `python -m moec.gpu.offline_worker FOLDER`. It takes the launch path of a real call, so that Triton specialises
the arguments (divisible by 16, equal to 1, within 2 GB) as it would there; only the driver is made of figures. A crash
or a hang of the compiler is this process's. Imports Triton, not torch.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class _Pointer:
    """A tensor argument: Triton looks at its type, its alignment and, for AMD, its extent."""

    dtype: str
    bytes: int

    def data_ptr(self) -> int:
        return 0

    def ptr_range(self) -> int:
        return self.bytes


@dataclass(frozen=True)
class _Driver:
    """What Triton asks its driver while it compiles: the target. Everything else would need a device."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def compile_job(job: Mapping[str, Any]) -> Any:
    """The compiled kernel of `job` (see moec.gpu.offline.Job)."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(_Driver(GPUTarget(job["backend"], job["arch"], job["warp"])))  # pyright: ignore[reportArgumentType]
    kernel = getattr(_module(Path(job["source"])), job["kernel"])
    arguments = {name: _argument(value) for name, value in job["arguments"].items()}
    options = {"num_warps": job["num_warps"], "num_stages": job["num_stages"], **job["options"]}
    return kernel.warmup(grid=(1,), **arguments, **options)


def _argument(value: Any) -> Any:
    return _Pointer(value["pointer"], value["bytes"]) if isinstance(value, dict) else value


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_kernels_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _disassemble(cubin: Path) -> None:
    """SASS and resource usage beside the cubin, by the tools that Triton brings."""
    from triton.tools.disasm import path_to_cuobjdump  # pyright: ignore[reportAttributeAccessIssue]

    for name, flag in (("sass", "-sass"), ("usage", "-res-usage")):
        done = subprocess.run([path_to_cuobjdump(), flag, str(cubin)], capture_output=True, text=True, check=True)
        cubin.with_suffix(f".{name}").write_text(done.stdout)


def main(folder: Path) -> None:
    """Compile folder/job.json; writes kernel.<ir> files and, last, result.json."""
    kernel = compile_job(json.loads((folder / "job.json").read_text()))
    for kind, text in kernel.asm.items():
        path = folder / f"kernel.{kind}"
        _ = path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text)
    cubin = folder / "kernel.cubin"
    if cubin.is_file():
        _disassemble(cubin)
    result = {"shared": int(kernel.metadata.shared), "num_warps": int(kernel.metadata.num_warps)}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
