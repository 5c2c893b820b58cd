"""Inference from a copy of the weights: in the order that kernels read, or in fewer bytes, with their error."""

import runpy
from pathlib import Path

import torch

import moec


def make():
    """The model of 01_compile.py: the target of `moec explain examples/07_copies_of_weights.py:make --no-grad`."""
    return runpy.run_path(str(Path(__file__).parent / "01_compile.py"))["make"]()


def off(compiled, model, x):
    """How far the compiled model is from eager, relative to eager's norm."""
    want = model(x)
    return ((compiled(x) - want).norm() / want.norm()).item()


def main():
    model, (x,) = make()
    with torch.no_grad():
        for options, allowed in (({"freeze": True}, 1e-5), ({"weights": "int8"}, 2e-2)):
            print(options, *moec.explain(model, x, moec_options=options).packed)
            compiled = torch.compile(model, backend="moec", options=options)
            error = off(compiled, model, x)
            model.experts[0].down.weight.mul_(2)  # torch counts changes in place: the next call makes the copy anew
            changed = off(compiled, model, x)
            print(f"  {error:.1e} off eager; {changed:.1e} after a parameter was changed")
            assert max(error, changed) < allowed
    print("copies follow their parameters")


if __name__ == "__main__":
    main()
