"""The one exception type for bad input."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what was wrong, what was expected.

    The command line prints it and exits with code 2; nothing has been written when it is raised.
    """
