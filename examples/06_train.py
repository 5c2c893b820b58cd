"""Train a library's language model, compiled and eager: the same losses (needs the test or bench extra)."""

import copy
import runpy
from pathlib import Path

import torch

STEPS = 3


def make():
    """The model of 04_library_model.py, in training: the target of `moec explain examples/06_train.py:make`."""
    here = Path(__file__).parent
    model, (tokens,), _ = runpy.run_path(str(here / "04_library_model.py"))["make"]()
    return model.train(), (tokens,), {"labels": tokens, "use_cache": False}


def losses(model, call, args, kwargs):
    """The loss before each step of AdamW on `model`'s own parameters, computed by `call`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = call(*args, **kwargs).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def main():
    model, args, kwargs = make()
    eager = copy.deepcopy(model)
    got = losses(model, torch.compile(model, backend="moec"), args, kwargs)
    want = losses(eager, eager, args, kwargs)
    print("compiled", [f"{loss:.4f}" for loss in got])
    print("eager   ", [f"{loss:.4f}" for loss in want])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    print("the same losses, on the model's own parameters")


if __name__ == "__main__":
    main()
