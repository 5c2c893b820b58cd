"""Workers that stand in for measuring, in this process or in one of their own: always the same answers."""

from __future__ import annotations

import os
import sys
import time
import zlib

from moec.codegen.tuning import Sizes
from moec.ir.spec import ExpertsSpec, KernelSpec
from moec.tune.job import Job
from moec.tune.run import tune

JOB = Job(str(KernelSpec(ExpertsSpec())), Sizes(64, 256, 128, 16, 4), 2)


def seconds_of(text):
    """A made-up time of a candidate."""
    return 1e-3 * (1 + zlib.crc32(text.encode()) % 1000 / 1000)


class Steady:
    """Answers at once and always the same."""

    def __init__(self, job=JOB, wrong=()):
        self.wrong, self.asked = wrong, []

    def ask(self, word, text=""):
        self.asked.append((word, text))
        if word == "check":
            return "ok", "wrong numbers" if text in self.wrong else ""
        return "ok", seconds_of(text) if word == "measure" else 0.0

    def close(self):
        pass


def serve(pipe, job):
    """A process whose candidates with few=0,0 crash and with row_block=48 hang."""
    while True:
        try:
            word, text = pipe.recv()
        except EOFError:
            return
        if word == "measure" and "few=0,0" in text:
            os._exit(7)
        if word == "measure" and "row_block=48 " in text:
            time.sleep(600)
        pipe.send(("ok", "" if word == "check" else seconds_of(text)))


def answer_once(pipe):
    """Say that it is ready, and answer a question."""
    pipe.send("ready")
    pipe.recv()
    pipe.send("yes")


def main():
    """A search that says on stdout whenever it has measured: to be killed."""
    tune(JOB, 1e9, Steady, lambda spent, measured: print(measured, flush=True) or time.sleep(0.002))


if __name__ == "__main__":
    sys.exit(main())
