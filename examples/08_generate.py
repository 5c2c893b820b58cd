"""Generate with a library's model and a static cache: two graphs for all prompts (needs the test or bench extra).

`model.generate` does the same with `model.forward = torch.compile(model.forward, backend="moec")` before it and
`cache_implementation="static", max_cache_len=32` in the call: without a length each prompt has a cache of another
size, and torch compiles anew. On a GPU `compile_config=CompileConfig(backend="moec")` compiles decoding alone.
"""

import runpy
from pathlib import Path

import torch
from torch._dynamo.utils import counters

PROMPTS = (5, 13, 8, 21)
NEW = 6
LONGEST = 32


def make():
    """The model of 04_library_model.py at one token: the target of `moec explain examples/08_generate.py:make`."""
    from transformers import StaticCache

    here = Path(__file__).parent
    model, _, _ = runpy.run_path(str(here / "04_library_model.py"))["make"]()
    cache = StaticCache(config=model.config, max_cache_len=LONGEST)
    with torch.no_grad():
        model(torch.randint(128, (1, 7)), past_key_values=cache)
    return model, (torch.randint(128, (1, 1)),), {"past_key_values": cache}


def greedy(model, call, prompt):
    """`prompt` [1, T] and the NEW tokens [1, NEW] that are each the likeliest, computed by `call`."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=LONGEST)
    tokens = [prompt]
    for _ in range(NEW):  # the first call reads the whole prompt, each other one token
        tokens.append(call(tokens[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    return torch.cat(tokens, 1)


def main():
    model, _, _ = make()
    compiled = torch.compile(model, backend="moec")
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for length in PROMPTS:
            prompt = torch.randint(128, (1, length))
            torch._dynamo.mark_dynamic(prompt, 1)  # else torch compiles the first length by itself, then for any length
            got, want = greedy(model, compiled, prompt), greedy(model, model, prompt)
            assert torch.equal(got, want), (got, want)
            graphs = counters["stats"]["unique_graphs"] - before
            print(f"prompt of {length:2}: {got[0, length:].tolist()}, as eager; graphs compiled so far: {graphs}")
    assert graphs == 2, "one for prompts of every length, one for a token"
    assert not counters["graph_break"]


if __name__ == "__main__":
    main()
