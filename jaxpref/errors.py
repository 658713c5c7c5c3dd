"""Exceptions that the command line turns into one line and an exit code."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line that names the file, the row (1-based) and the field where
    there are any, says what was found there, and says what to do about it.  The command
    line prints it without a traceback and exits with code 2.
    """


DIVERGED = 65
"""Exit code of a run that stopped itself: the same command would stop again."""


class Stopped(Exception):
    """Too many steps in a row went wrong: the run has reported them and ends."""


def first_line(error: BaseException) -> str:
    """What an error says, for our own one line: at most 200 characters.

    The first line of its message, or the name of its type where it says nothing.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
