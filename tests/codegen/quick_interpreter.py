"""Triton's interpreter without two things that only cost time: it patches its language anew at every nested call, and
computes every int32 sum a second time to see whether it overflows."""

import dataclasses

import pytest
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    patched = set()

    def call(self, *args, **kwargs):
        key = id(self.fn.__globals__)
        if key not in patched:
            patched.add(key)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
