"""Run the command line in a process that starts at once: forked from one that has imported train.py."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["train", "peft", "tests.tools.processes"])


def start(flags: list[str], output: Path, inject: Callable | None = None) -> multiprocessing.Process:
    """Start `python train.py flags`.

    Args:
        output: File that its output is appended to.
        inject: Called in the new process before training; a function that can be pickled.
    """
    process = FORKSERVER.Process(target=_run, args=(flags, output, inject))
    process.start()
    return process


def _run(flags: list[str], output: Path, inject: Callable | None) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    os.chdir(ROOT)
    import torch

    import train

    torch.set_num_threads(1)
    # A shell starts background jobs, such as a test suite, with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if inject:
        inject()
    sys.argv = ["train.py", *flags]
    train.cli()


def finish(process: multiprocessing.Process, timeout: float = 120) -> int:
    """Wait for the process to end, and return its exit status, which is negative for a signal."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"still running after {timeout} s")
    return process.exitcode


def run(flags: list[str], output: Path, inject: Callable | None = None) -> tuple[int, str]:
    """Start a process, wait for its end, and return its exit status and output."""
    output.unlink(missing_ok=True)
    status = finish(start(flags, output, inject))
    return status, output.read_text()


def wait_for(condition: Callable[[], object], timeout: float = 60) -> None:
    """Wait until the condition is true."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"the condition is still false after {timeout} s")
        time.sleep(0.01)
