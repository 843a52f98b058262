"""SIGTERM, SIGHUP and Ctrl-C in training. The first saves and ends the run, a second ends it at once."""

import contextlib
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
    """Handle SIGTERM, SIGHUP (a closed terminal) and SIGINT until `close`.

    Signals that the process already ignored, as after nohup, stay ignored.

    Python allows signal handlers only in the main thread. In other threads this class does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._may_abandon_step = False
        self._previous_handlers = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous_handlers[signum] = signal.signal(signum, self._handle)

    def begin_step(self) -> None:
        """End the training here if a signal has arrived. Until `hold`, any signal ends it immediately.

        With several processes a signal waits for the next step, because all of them have to stop at the same
        point.

        Raises:
            Stopped: A signal has arrived.
        """
        self._may_abandon_step = parallel.processes() == 1
        received = max(parallel.gather([self.received or 0]))
        if received:
            raise Stopped(received)

    def hold(self) -> None:
        """From now on, a signal takes effect only at the next `begin_step`."""
        self._may_abandon_step = False

    def close(self) -> None:
        """Restore the previous handlers."""
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)
        self._previous_handlers = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + signum)
        self.received = signum
        doing = "saving" if self._may_abandon_step else "saving after this step"
        line = f"\n{signal.Signals(signum).name}: {doing}; send it again to exit immediately\n"
        with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal left
            os.write(2, line.encode())  # not print(), because it is not reentrant
        if self._may_abandon_step:
            self._may_abandon_step = False
            raise Stopped(signum)
