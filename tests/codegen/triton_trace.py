"""What the interpreter really launches, reads and writes: a record of launches, and of the bytes that each touches."""

import dataclasses
import inspect

import numpy as np
from triton.runtime import interpreter


@dataclasses.dataclass
class Launched:
    """One launch: its kernel, and by argument which elements were read and written, and the bytes of an element."""

    kernel: str
    read: dict
    written: dict
    itemsize: dict

    def bytes(self):
        """By argument; an element that is read and written counts twice."""
        return {
            name: int(self.read[name].sum() + self.written[name].sum()) * each for name, each in self.itemsize.items()
        }


def extent(tensor):
    """Elements from a tensor's first to its last: a storage is all of a call's buffers."""
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def trace(monkeypatch):
    """A list that grows by a `Launched` a launch from here on."""
    launches, spans = [], []
    call = interpreter.GridExecutor.__call__
    builder = interpreter.InterpreterBuilder

    def traced(self, *args, **kwargs):
        named = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in self.arg_names})
        tensors = {name: value for name, value in named.items() if hasattr(value, "data_ptr")}
        marks = [{n: np.zeros(extent(t), bool) for n, t in tensors.items()} for _ in range(2)]
        launches.append(Launched(self.fn.__name__, *marks, {n: t.element_size() for n, t in tensors.items()}))
        spans[:] = [(n, t.data_ptr(), extent(t) * t.element_size()) for n, t in tensors.items()]
        return call(self, *args, **kwargs)

    def mark(kind, ptrs, mask):
        touched = np.unique(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)]).astype(np.int64)
        now = launches[-1]
        for name, base, size in spans:
            inside = touched[(touched >= base) & (touched < base + size)] - base
            getattr(now, kind)[name][inside // now.itemsize[name]] = True

    def watched(method, *kinds):
        plain = getattr(builder, method)

        def run(self, *args):
            pointers, mask = (args[1], args[3]) if method == "create_atomic_rmw" else (args[0], args[1])
            mask = args[2] if method == "create_masked_store" else mask
            for kind in kinds:
                mark(kind, pointers, mask)
            return plain(self, *args)

        monkeypatch.setattr(builder, method, run)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", traced)
    watched("create_masked_load", "read")
    watched("create_masked_store", "written")
    watched("create_atomic_rmw", "read", "written")
    return launches
