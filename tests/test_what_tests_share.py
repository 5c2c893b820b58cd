"""What tests/conftest.py sets for all tests, or for some, is so where they run."""

from __future__ import annotations

import logging

from moec.codegen import build


def test_nobody_listens_to_what_torch_would_trace():
    listening = logging.getLogger("torch.__trace").handlers
    assert [each for each in listening if not type(each).__module__.startswith("torch.")] == []


def test_kernels_on_trial_are_built_as_they_are_for_users():
    assert "-O0" not in build._FLAGS_FAST
