"""The one exception that means "what the user gave cannot work"."""


class InputError(ValueError):
    """A value from the user that cannot work; its message names the value, the rule and the way out.

    The command line prints the message alone. Any other exception is a bug of ours and keeps its traceback.
    """
