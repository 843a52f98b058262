"""Math-Verify in a process of its own: whether two expressions are the same, within a time and a memory that hold.

Its comparison can run for ever (huggingface/Math-Verify#65), its own time limit is a signal, which works in the main thread
alone and cannot interrupt the arithmetic of large integers, and memory that sympy takes is not given back. So: another
interpreter, without torch, that is killed and replaced when it breaks a limit.

Run as a script, this file is that process: it reads one JSON list [answer, truth] a line and writes true or false.
"""

import contextlib
import enum
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import Protocol

ITEM_SECONDS = 3.0
START_SECONDS = 60.0  # to import sympy, on a machine that is busy with something else
MEMORY_BYTES = 2 * 2**30  # of address space: sympy alone takes 0.4 GB of it


class Outcome(enum.Enum):
    EQUAL = "true"
    DIFFERENT = "false"  # or not to be read
    BROKE_LIMIT = "none"  # the process has been replaced


class SymbolicWorker:
    """The process, from the outside. Started by `start` or the first question; safe to ask from several threads.

    A fork has no part in its parent's process and starts one of its own.

    Args:
        item_seconds: Wall-clock limit of one comparison.
    """

    def __init__(self, item_seconds: float = ITEM_SECONDS):
        self.item_seconds = item_seconds
        self.restarts = 0
        self._lock = threading.Lock()
        renew_lock_after_fork(self)
        self._process: subprocess.Popen | None = None
        self._owner = 0  # process id of who started it
        self._end: weakref.finalize | None = None
        self._ready = False
        self._buffer = b""

    def start(self) -> None:
        """Start the process without waiting for it."""
        with self._lock:
            self._start()

    def close(self) -> None:
        """End the process. Another question would start another."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        self._stop()
        # -I: neither the current folder nor the environment decides what it imports.
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, str(self.item_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the trainer to answer
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._owner, self._ready, self._buffer = os.getpid(), False, b""
        self._end = weakref.finalize(self, _end_process, self._process, self._owner)  # at exit at the latest

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def ask(self, answer: str, truth: str, deadline: float) -> Outcome:
        """Whether an answer equals the truth, both in delimited LaTeX; `answer` empty: whether `truth` can be read at all.

        Args:
            deadline: `time.monotonic()` by which to give up.
        """
        with self._lock:
            if time.monotonic() >= deadline:
                return Outcome.BROKE_LIMIT
            self._start()
            try:
                if not self._ready:
                    self._ready = self._read_line(min(deadline, time.monotonic() + START_SECONDS)) == b"ready"
                line = self._exchange(json.dumps([answer, truth]).encode() + b"\n", deadline) if self._ready else None
            except BaseException:  # Ctrl-C: the reply that is still to come must not answer the next question
                self._stop()
                raise
            if line in (b"true", b"false"):
                return Outcome(line.decode())
            self._stop()
            self.restarts += 1
            self._start()
            return Outcome.BROKE_LIMIT

    def _exchange(self, question: bytes, deadline: float) -> bytes | None:
        assert self._process is not None and self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), question)  # at most a few kB: a pipe holds 64
        except OSError:
            return None
        return self._read_line(min(deadline, time.monotonic() + self.item_seconds))

    def _read_line(self, deadline: float) -> bytes | None:
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()  # select.select fails on descriptors above 1,023
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                return None
            chunk = os.read(descriptor, 4096)
            if not chunk:
                return None
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line


def _end_process(process: subprocess.Popen, owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
    for pipe in filter(None, (process.stdin, process.stdout)):
        with contextlib.suppress(OSError):
            pipe.close()
    if os.getpid() == owner:
        process.wait()  # no zombie


class HasLock(Protocol):
    _lock: threading.Lock


def renew_lock_after_fork(owner: HasLock) -> None:
    """Give an object a new lock in every fork: another thread may hold the old one there for ever."""
    reference = weakref.ref(owner)

    def renew() -> None:
        if (it := reference()) is not None:
            it._lock = threading.Lock()

    os.register_at_fork(after_in_child=renew)


def _serve(item_seconds: float) -> None:
    import resource
    import warnings

    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit; elsewhere a lower one may hold already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    warnings.filterwarnings("ignore")
    import logging

    logging.disable(logging.CRITICAL)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes nowhere
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    # What it loads and builds when it is first used: 0.15 s that no completion should wait for.
    verify(parse("$x+1$", targets, parsing_timeout=None), parse("$(1, 2x)$", targets, parsing_timeout=None), timeout_seconds=None)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        # If the trainer dies while this computes, the default action of the alarm ends this process, from outside of Python.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, item_seconds + 2)
        answer, truth = json.loads(line)
        try:
            gold = parse(truth, targets, parsing_timeout=None)
            if not answer:
                verdict = any(not isinstance(g, str) for g in gold)
            else:
                # Their order matters: what is true first.
                found = parse(answer, targets, parsing_timeout=None)
                verdict = verify(gold, found, float_rounding=6, allow_set_relation_comp=True, timeout_seconds=None)
        except MemoryError:
            os._exit(1)
        except Exception:  # sympy raises anything on expressions that mean nothing
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=out, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
