"""A GPU that is not there: tensors without data on it, torch's and Triton's drivers replaced by records.

The code under test is the code that runs on a GPU; only the last call, of the vendor's driver, is written down instead.
"""

import contextlib
import ctypes
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

# torch built for CPUs knows no device guard of a GPU, and without one no fake tensor of a GPU can be indexed.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
struct Pretended final : c10::impl::DeviceGuardImplInterface {
  static thread_local c10::DeviceIndex now;
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device d) const override {
    auto old = now;
    if (d.index() >= 0) now = d.index();
    return {type(), old};
  }
  c10::Device getDevice() const override { return {type(), now}; }
  void setDevice(c10::Device d) const override { now = d.index(); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { now = d.index(); }
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getDefaultStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
};
thread_local c10::DeviceIndex Pretended::now = 0;
c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, new Pretended);
}
"""


def register_guard(folder):
    """A device guard of GPUs for this process, where torch has none."""
    if torch.backends.cuda.is_built():
        return
    home, made = Path(torch.__file__).parent, folder / "guard.so"
    source = folder / "guard.cpp"
    source.write_text(GUARD)
    command = ["-std=c++20", "-O0", "-shared", "-fPIC", str(source), f"-I{home}/include", f"-L{home}/lib", "-lc10"]
    subprocess.run([os.environ.get("CXX", "g++"), *command, "-o", str(made)], check=True)
    ctypes.CDLL(str(made))


H100 = SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10, gcnArchName="", name="H100",
)  # fmt: skip
A100 = SimpleNamespace(**{**vars(H100), "major": 8, "multi_processor_count": 108,
                          "shared_memory_per_block_optin": 163 << 10})  # fmt: skip
MI300 = SimpleNamespace(
    major=9, minor=4, multi_processor_count=304, shared_memory_per_block=64 << 10,
    gcnArchName="gfx942:sramecc+:xnack-", name="MI300X",
)  # fmt: skip


@dataclass
class Gpu:
    """What was asked of the drivers.

    launches   (kernel, grid, device, stream, arguments by name, options, signature, attrs) of each
    guarded    the devices that were made current
    compiled   the kernels that were compiled, in order
    refuses    called with (kernel, options) when one is compiled; raises what the compiler would
    """

    properties: SimpleNamespace
    current: int = 0
    capturing: bool = False
    launches: list = field(default_factory=list)
    compiled: list = field(default_factory=list)
    refuses: object = None
    pending: bool = False
    waits: int = 0
    in_pool: set = field(default_factory=set)
    guarded: list = field(default_factory=list)

    @property
    def target(self):
        """As Triton names it."""
        p = self.properties
        if p.gcnArchName:
            return GPUTarget("hip", p.gcnArchName.partition(":")[0], 64)
        return GPUTarget("cuda", 10 * p.major + p.minor, 32)


class Kernel(CompiledKernel):
    """A compiled kernel without code: its launcher writes down what it is given, and calls the hooks."""

    function = packed_metadata = None

    def __init__(self, gpu, src, options):
        self.gpu, self.src, self.options, self.name = gpu, src, options, src.fn.fn.__name__

    def _init_handles(self):
        if self.gpu.refuses is not None:
            self.gpu.refuses(self.name, self.options)

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        named = dict(zip(self.src.fn.arg_names, args, strict=True))
        if enter is not None:
            enter(metadata)
        self.gpu.launches.append(
            SimpleNamespace(
                kernel=self.name, grid=(x, y, z), device=self.gpu.current, stream=stream, arguments=named,
                options=self.options, signature=self.src.signature, attrs=self.src.attrs,
            )
        )  # fmt: skip
        if leave is not None:
            leave(metadata)


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self, stream):
        pass

    def query(self):
        return not self.gpu.pending


def pretend(monkeypatch, properties, compiler=None):
    """A Gpu that torch and Triton take for the machine's own until the test ends; `compiler` None: nothing compiles."""
    gpu = Gpu(properties)

    def compiled(src, target=None, options=None, **_):
        gpu.compiled.append(src.fn.fn.__name__)
        return Kernel(gpu, src, dict(options or {}))

    monkeypatch.setattr("triton.compiler.compile", compiler or compiled)
    fake = SimpleNamespace(
        get_current_device=lambda: gpu.current,
        get_current_stream=lambda device: 1000 + device,
        get_current_target=lambda: gpu.target,
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": properties.shared_memory_per_block_optin},
            load_binary=lambda name, kernel, shared, device: (object(), object(), 0, 0, 1024),
        ),
        launcher_cls=lambda src, metadata: (
            lambda *a: gpu.launches.append(
                SimpleNamespace(kernel=src.fn.fn.__name__, grid=a[:3], options=metadata._asdict())
            )
        ),
    )
    monkeypatch.setattr(driver, "_active", fake)
    monkeypatch.setattr(torch.version, "hip", "6.4" if properties.gcnArchName else None)
    for name, value in cuda_of(gpu, properties).items():
        monkeypatch.setattr(torch.cuda, name, value)
    give_addresses(monkeypatch)
    return gpu


def cuda_of(gpu, properties):
    """What torch.cuda is asked, by name, as the Gpu answers it."""

    @contextlib.contextmanager
    def on(device):
        old, gpu.current = gpu.current, torch.device(device).index
        gpu.guarded.append(gpu.current)
        yield
        gpu.current = old

    return {
        "device": on,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: SimpleNamespace(
            wait_event=lambda event: setattr(gpu, "waits", gpu.waits + 1)
        ),
        "is_current_stream_capturing": lambda: gpu.capturing,
        "get_device_properties": lambda device: properties,
        "Event": lambda: Event(gpu),
        "_lazy_init": lambda: None,
    }


def give_addresses(monkeypatch):
    """Addresses without data to tensors of a pretended GPU: each storage its own, as torch's allocator aligns."""
    plain, places = torch.Tensor.data_ptr, {}

    def data_ptr(self):
        if self.device.type != "cuda":
            return plain(self)
        base = places.setdefault(self.untyped_storage()._cdata, 512 * (len(places) + 1 << 20))
        return base + self.storage_offset() * self.element_size()

    monkeypatch.setattr(torch.Tensor, "data_ptr", data_ptr)


MODE = FakeTensorMode(allow_non_fake_inputs=True)


def tensor(*shape, dtype=torch.float32, device="cuda:1"):
    """A tensor on the pretended GPU."""
    with MODE:
        return torch.empty(shape, dtype=dtype, device=device)
