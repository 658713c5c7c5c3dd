"""Exceptions that the command line reports as one line and an exit code."""


class InputError(ValueError):
    """Invalid input from the user.

    The message is one line.  It names the file, the row (1-based), and the field if
    there are any, states the problem, and says what to do about it.  The command line
    prints it without a traceback and exits with code 2.
    """


DIVERGED = 65
"""Exit code of a run that stopped itself; the same command would stop again."""


class Stopped(Exception):
    """Too many consecutive steps went wrong; the run has reported them and ends."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters.

    The name of its type if the message is empty.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
