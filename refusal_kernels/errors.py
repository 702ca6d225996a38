"""The one exception type for bad input."""

LONGEST = 2000  # characters of a message: what a hostile file quotes can be of any length


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what was wrong, what was expected.

    The command line prints it and exits with code 2; nothing has been written when it is raised.
    What a message quotes from a file may hold anything: line ends and control characters become
    spaces here.
    """

    def __init__(self, message: str) -> None:
        line = "".join(char if char.isprintable() else " " for char in message[: LONGEST + 1])
        super().__init__(line if len(line) <= LONGEST else line[:LONGEST] + "...")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
