"""The exceptions whose message is for the user; any other is a bug of ours and keeps its traceback."""


class InputError(ValueError):
    """A value from the user that cannot work; its message names the value, the rule and the way out.

    The command line prints the message alone and exits with status 2.
    """


class TrainingError(RuntimeError):
    """The training cannot go on; its message says what is saved and how to continue. The command line exits with status 1."""
