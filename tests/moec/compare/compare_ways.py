"""Ways to run a layer that are good, wrong, slow or dead: built in processes of their own, so importable by name."""

import os
import time

import torch

from moec.compare.worker import Built

INPUTS = {1: torch.ones(1, 8), 7: torch.ones(7, 8)}


def good():
    return Built(lambda x: x + 1, INPUTS, lambda tokens, y: "" if torch.equal(y, INPUTS[tokens] + 1) else "WRONG")


def wrong():
    return Built(lambda x: x, INPUTS, lambda tokens, y: "WRONG: relative error 1")


def hangs_at_7():
    return Built(lambda x: time.sleep(600) if len(x) == 7 else x, INPUTS, lambda tokens, y: "")


def dies():
    os._exit(3)


def fails():
    raise ValueError("no such form")


def dies_when_timed():
    """Ends its process in the third long call: the first and a warm one are made before any is timed."""
    calls = []

    def call(x):
        calls.append(len(x))
        if len(calls) > 4:
            os._exit(3)
        time.sleep(0.3)
        return x

    return Built(call, INPUTS, lambda tokens, y: "")
