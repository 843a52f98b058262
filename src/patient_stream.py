"""Standard output that a full disk does not turn into the end of a run."""

from typing import TextIO


class PatientStream:
    """A text stream whose lines wait in memory while there is no room for them (`python train.py > train.log`).

    A pipe that nobody reads any longer still ends the program.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            raise
        except OSError:  # the stream has the text, and writes it when it can
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError:
            pass

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
