"""A whole language model from a library, untouched: tiny, random weights (needs the test or bench extra)."""

import torch

import moec


def make():
    """The target of `moec explain examples/04_library_model.py:make`."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        experts_implementation="eager",
    )
    model = MixtralForCausalLM(config).eval()
    return model, (torch.randint(128, (1, 13)),), {"use_cache": False}


def main():
    model, args, kwargs = make()
    with torch.no_grad():
        print(moec.explain(model, *args, **kwargs))
        compiled = torch.compile(model, backend="moec")
        got, want = compiled(*args, **kwargs).logits, model(*args, **kwargs).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    print("\nlogits equal to eager")


if __name__ == "__main__":
    main()
