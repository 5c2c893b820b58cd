"""Processes of a command: Ctrl-C does not reach them, and reaches the command as before."""

import multiprocessing
import os
import signal

import tune_fakes

from moec.children import start_child


def test_a_child_does_not_see_ctrl_c():
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=tune_fakes.answer_once, args=(there,), daemon=True)
    start_child(process)
    there.close()
    assert here.recv() == "ready"
    os.kill(process.pid, signal.SIGINT)
    here.send("still there?")
    assert here.recv() == "yes"
    process.join()
    assert process.exitcode == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
