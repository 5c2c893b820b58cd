"""Random MoE layers from a grammar: matched and equal, or left alone and equal, with a reason that names a line.

pytest tests/fuzz                                   a few, always the same
pytest tests/fuzz -m fuzz -s --fuzz-seconds=600     as many as fit, new ones each time, and a summary
pytest tests/fuzz -m fuzz -s --fuzz-seconds=7200 --fuzz-modules=2000
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

QUICK = {"rest": "eager", "kernels": "eager"}
ALONE = {**QUICK, "proof": "off"}  # the matcher must be right without the proof


@dataclass(frozen=True)
class Way:
    """How one module is compiled."""

    options: dict[str, str]
    dynamic: bool = False


WAYS = (
    *(Way(ALONE),) * 17,
    *(Way(QUICK),) * 9,
    *(Way(ALONE, dynamic=True),) * 3,
    Way({"rest": "eager", "kernels": "auto", "proof": "off"}),  # a kernel of its own costs seconds of the C++ compiler
)
QUIET = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck), verbosity=Verbosity.quiet)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path))


def test_a_few_modules_of_the_grammar(grammar, checking, tmp_path):
    seen, end = checking.Summary(), time.monotonic() + 25

    @settings(max_examples=25, derandomize=True, phases=[Phase.generate], **QUIET)
    @given(grammar.samples())
    def few(sample):
        if time.monotonic() < end:
            checking.judge(sample, tmp_path, seen, QUICK)

    few()
    print(seen)
    assert seen.modules, "not one module in 25 s: the machine is too busy for this test to say anything"
    assert seen.supported_fused >= 0.8 * seen.supported, str(seen)


def test_a_wrong_answer_is_reported_as_source(grammar, checking, tmp_path, monkeypatch):
    """With a matcher that takes the wrong gate for the right one, the fuzzer says so and shows a module that runs."""
    from moec.codegen import twin

    halves = twin._halves
    monkeypatch.setattr(
        twin, "_halves", lambda ab, gate: halves(ab, gate)[::-1] if gate == "concat" else halves(ab, gate)
    )
    parts = grammar.Parts(
        4,
        2,
        8,
        "linear",
        False,
        "softmax",
        "plain",
        1.0,
        "gathered_bmm",
        "gated",
        "silu",
        False,
        "index_add",
        "none",
        "none",
    )
    sample = grammar.Sample(grammar.write(parts, "float32"), 13, "float32", False, True, "", (13, grammar.H))
    with pytest.raises(checking.Wrong, match="runnable source"):
        checking.judge(sample, tmp_path, checking.Summary(), {**QUICK, "proof": "off"})


@pytest.mark.fuzz
def test_as_many_modules_as_fit(grammar, checking, tmp_path, request):
    """Most on the eager engine with the proof off: the matcher stands alone; some proved, with symbolic T, in C++.

    A wrong answer is shrunk and printed at once, and the run goes on.
    """
    seconds, modules = (request.config.getoption(name) for name in ("--fuzz-seconds", "--fuzz-modules"))
    seen, wrong, start, began = checking.Summary(), [], time.monotonic(), time.time_ns()

    def over() -> bool:
        return time.monotonic() - start > seconds or seen.modules >= modules

    gc.collect()
    gc.freeze()  # going through all of torch again and again is a sixth of a compile
    while not over():

        @seed(began + seen.modules)
        @settings(max_examples=50, phases=[Phase.generate, Phase.shrink], **QUIET)
        @given(grammar.samples(), st.sampled_from(WAYS))
        def many(sample, way):
            if not over():
                checking.judge(sample, tmp_path, seen, way.options, way.dynamic)

        try:
            many()
        except checking.Wrong as error:
            wrong.append(str(error))
            print(f"\nWRONG {len(wrong)}: {error}", flush=True)
        print(f"\nafter {time.monotonic() - start:.0f} s: {seen}", flush=True)
    assert not wrong, "\n\n".join(wrong)
    assert seen.supported_fused >= 0.95 * seen.supported, str(seen)
    assert not seen.missing_reason, str(seen)
