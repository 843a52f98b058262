"""SIGTERM and Ctrl-C while a run trains: the first asks it to save and end, the second ends it at once."""

import os
import signal
import threading
from types import FrameType

from src import parallel


class Stopped(KeyboardInterrupt):
    """A signal has ended the training."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum  # what shells and schedulers expect


class StopSignals:
    """Takes SIGTERM and SIGINT from now until `close`; a signal that the process was started to ignore stays ignored.

    Outside of the main thread, where Python does not allow it, nothing is taken.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._abandons = False
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._handle)

    def begin_step(self) -> None:
        """End the training here if a signal came; one that comes from now until `hold` ends it wherever it is.

        With several processes a signal waits for the next step: all of them have to end at the same place.

        Raises:
            Stopped: A signal came.
        """
        self._abandons = parallel.processes() == 1
        received = max(parallel.gather([self.received or 0]))
        if received:
            raise Stopped(received)

    def hold(self) -> None:
        """From here on, a signal waits for `begin_step`."""
        self._abandons = False

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + signum)
        self.received = signum
        now = "saving" if self._abandons else "saving after this step"
        # Not print(), which cannot be entered twice.
        os.write(2, f"\n{signal.Signals(signum).name}: {now}; once more to end at once\n".encode())
        if self._abandons:
            self._abandons = False
            raise Stopped(signum)
