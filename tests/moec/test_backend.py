"""The backend's own steps that no model's answer shows."""

from __future__ import annotations

import torch
from torch._inductor import compile_fx as inductor

from moec.backend import Backend, compile_graph
from moec.proof.store import source_hash


def test_what_torch_keeps_on_disk_is_keyed_on_moecs_source_and_the_users_tag(monkeypatch):
    seen: list[str] = []

    def compile_fx(gm, example_inputs, config_patches=None):
        seen.append(torch.compiler.config.cache_key_tag)
        return gm.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    gm = torch.fx.symbolic_trace(torch.nn.Linear(3, 4))
    with torch.compiler.config.patch(cache_key_tag="mine "):
        Backend()(gm, [torch.ones(2, 3)])
        assert torch.compiler.config.cache_key_tag == "mine "
    assert seen == [f"mine moec-{source_hash()}"]


def test_the_entry_point_is_known_as_moecs_own():
    assert compile_graph.__moec_backend__
    assert Backend.__moec_backend__
