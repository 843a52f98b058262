"""Exceptions whose message is meant for the user. Any other exception is a bug and keeps its traceback."""


class InputError(ValueError):
    """A value that the user passed cannot work. The message gives the value, the rule and the way out.

    The command line prints only the message and exits with status 2.
    """


class TrainingError(RuntimeError):
    """Training cannot continue. The message says what is saved and how to resume.

    The command line exits with status 1.
    """


def first_line(error: Exception) -> str:
    """Describe an exception in one line, for a message.

    >>> first_line(KeyError("name")), first_line(ValueError("one\\ntwo")), first_line(OSError())
    ("KeyError: 'name'", 'ValueError: one', 'OSError: no message')
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
