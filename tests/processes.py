"""The command line in a process of its own that starts in a moment: forked from one that has already imported train.py."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["train", "peft", "tests.processes"])


def start(flags: list[str], output: Path, inject: Callable | None = None) -> multiprocessing.Process:
    """`python train.py flags`, its lines in a file; `inject`, a function of this package, is called there before."""
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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background of a shell ignores it
    if inject:
        inject()
    sys.argv = ["train.py", *flags]
    train.cli()


def finish(process: multiprocessing.Process, timeout: float = 120) -> int:
    """Wait for the end; the exit status, negative for a signal."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"still running after {timeout} s")
    return process.exitcode


def run(flags: list[str], output: Path, inject: Callable | None = None) -> tuple[int, str]:
    """Exit status and lines of a whole run."""
    output.unlink(missing_ok=True)
    status = finish(start(flags, output, inject))
    return status, output.read_text()


def wait_for(condition: Callable[[], object], timeout: float = 60) -> None:
    """Return as soon as the condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not come")
        time.sleep(0.01)
