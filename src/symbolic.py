"""Compare two expressions with Math-Verify, in a separate process with limits on time and memory.

Math-Verify can run forever (huggingface/Math-Verify#65). Its own time limit is a signal, which works only in
the main thread and cannot interrupt arithmetic with large integers. Sympy never frees the memory it takes.
That is why another interpreter, without torch, does the comparison. This process is killed and replaced if it
breaks a limit.

When run as a script, this file is that process. It reads one JSON list [answer, truth] per line and writes
true or false.
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
START_SECONDS = 60.0  # enough to import sympy on a busy machine
MEMORY_BYTES = 2 * 2**30  # address space; sympy by itself needs 0.4 GB of it


class Outcome(enum.Enum):
    """The result of a comparison."""

    EQUAL = "true"
    DIFFERENT = "false"  # or unreadable
    BROKE_LIMIT = "none"  # the process was replaced, or the deadline had passed


class SymbolicWorker:
    """Starts the process, sends it comparisons and replaces it if necessary. Thread-safe.

    The process is started by `start` or the first `ask`. After a fork, the child starts a process of its own.

    Args:
        item_seconds: Time limit of one comparison, in seconds of wall-clock time.
    """

    def __init__(self, item_seconds: float = ITEM_SECONDS):
        self.item_seconds = item_seconds
        self.restarts = 0
        self._lock = threading.Lock()
        renew_lock_after_fork(self)
        self._process: subprocess.Popen | None = None
        self._owner = 0  # id of the process that started `_process`
        self._end: weakref.finalize | None = None
        self._ready = False
        self._buffer = b""

    def start(self) -> None:
        """Start the process without waiting for it."""
        with self._lock:
            self._start()

    def close(self) -> None:
        """End the process. Another `ask` would start a new one."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        self._stop()
        # -I: imports depend neither on the current folder nor on the environment.
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__, str(self.item_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # leave Ctrl-C to the trainer
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
        """Whether an answer equals the truth.

        Args:
            answer: LaTeX with its delimiters. If empty, the question is only whether `truth` can be read.
            truth: LaTeX with its delimiters.
            deadline: Value of `time.monotonic()` at which to give up.
        """
        with self._lock:
            if time.monotonic() >= deadline:
                return Outcome.BROKE_LIMIT
            self._start()
            try:
                if not self._ready:
                    self._ready = self._read_line(min(deadline, time.monotonic() + START_SECONDS)) == b"ready"
                line = (
                    self._exchange(json.dumps([answer, truth]).encode() + b"\n", deadline)
                    if self._ready
                    else None
                )
            except BaseException:  # such as Ctrl-C: the pending reply must not be taken for the next one
                self._stop()
                raise
            if line in (b"true", b"false"):
                return Outcome(line.decode())
            self._stop()
            self.restarts += 1
            self._start()
            return Outcome.BROKE_LIMIT

    def _exchange(self, request: bytes, deadline: float) -> bytes | None:
        """Send a line and return the reply, or None if it does not come in time."""
        assert self._process is not None and self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), request)  # a few kB at most; a pipe holds 64 kB
        except OSError:
            return None
        return self._read_line(min(deadline, time.monotonic() + self.item_seconds))

    def _read_line(self, deadline: float) -> bytes | None:
        """The next line from the process, or None if it does not come in time."""
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
    """Close the pipes to a process, and kill it if this is the process that started it."""
    if os.getpid() == owner:
        process.kill()
    for pipe in filter(None, (process.stdin, process.stdout)):
        with contextlib.suppress(OSError):
            pipe.close()
    if os.getpid() == owner:
        process.wait()  # leaves no zombie


class HasLock(Protocol):
    """An object with a lock."""

    _lock: threading.Lock


def renew_lock_after_fork(owner: HasLock) -> None:
    """After a fork, give the child's object a new lock: a thread of the parent may hold the old one."""
    reference = weakref.ref(owner)

    def renew() -> None:
        if (current := reference()) is not None:
            current._lock = threading.Lock()

    os.register_at_fork(after_in_child=renew)


def _serve(item_seconds: float) -> None:
    """Answer the lines on standard input until it closes."""
    import logging
    import resource
    import warnings

    # macOS has no such limit; elsewhere a lower one may already apply.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # discard whatever libraries print
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    # The first use takes 0.15 s to load and build things, and no completion should wait for that.
    verify(
        parse("$x+1$", targets, parsing_timeout=None),
        parse("$(1, 2x)$", targets, parsing_timeout=None),
        timeout_seconds=None,
    )
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        # If the trainer dies during a computation, the alarm's default action ends this process. A handler in
        # Python could not interrupt the computation.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, item_seconds + 2)
        answer, truth = json.loads(line)
        try:
            gold = parse(truth, targets, parsing_timeout=None)
            if not answer:
                verdict = any(not isinstance(g, str) for g in gold)
            else:
                # The order of the arguments to verify() matters: the truth comes first.
                found = parse(answer, targets, parsing_timeout=None)
                verdict = verify(
                    gold, found, float_rounding=6, allow_set_relation_comp=True, timeout_seconds=None
                )
        except MemoryError:
            os._exit(1)
        except Exception:  # sympy may raise anything on a meaningless expression
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=out, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
