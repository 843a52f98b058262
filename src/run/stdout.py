"""Standard output that survives a full disk."""

import contextlib
import os
from typing import TextIO


class PatientStream:
    """Write complete lines, and keep them in memory while the disk is full (`python train.py > train.log`).

    A pipe that nobody reads anymore still ends the program.

    Args:
        stream: A stream that writes to a file, a pipe or a terminal.
    """

    def __init__(self, stream: TextIO):
        stream.flush()
        self._stream = stream
        self._waiting = b""

    def write(self, text: str) -> int:
        self._waiting += text.encode(self._stream.encoding, "backslashreplace")
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            try:
                while self._waiting:
                    self._waiting = self._waiting[os.write(self._stream.fileno(), self._waiting) :]
            except BrokenPipeError:
                self._waiting = b""
                raise SystemExit(1) from None

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
