"""Exceptions that the command line reports, and how text reaches the terminal."""

import sys
import unicodedata
from typing import TextIO


class InputError(ValueError):
    """Invalid input from the user.

    The message is one line.  It names the file, the row (1-based), and the field if
    there are any, states the problem, and says what to do about it.  The command line
    prints it without a traceback and exits with code 2.
    """


class OutOfMemory(InputError):
    """The host or a device does not have enough memory for what was asked.

    The command line exits with `OUT_OF_MEMORY`.
    """


DIVERGED = 65
"""Exit code of a run that stopped itself; the same command would stop again."""
OUT_OF_MEMORY = 66
"""Exit code of a command that ran out of memory, as the same command would again."""


class Stopped(Exception):
    """Too many consecutive steps went wrong; the run has reported them and ends."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters.

    The name of its type if the message is empty.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


JOINERS = "\u200c\u200d"
"""Invisible characters that emoji and several scripts need."""
SIGNS = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2"
"""Visible signs that Unicode counts as format characters."""


def visible(text: object) -> str:
    r"""Text in which no character can control the terminal or hide others.

    Text from data, files and models is printed only in this form.  Control characters
    (C0 except newline and tab, DEL, C1), format characters (such as those that reverse
    the direction of text, and tags), line separators, and bytes of file names that are
    not UTF-8 become their escapes: ESC becomes the four characters `\x1b`.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(map(_visible, text))


def visible_line(text: object) -> str:
    r"""`visible` in one line: newlines become `\n`."""
    return visible(text).replace("\n", "\\n")


def _visible(character: str) -> str:
    if character.isprintable() or character in "\n\t" + JOINERS + SIGNS:
        return character
    code = ord(character)
    # Rare spaces, private characters of fonts, characters newer than Python's tables.
    if unicodedata.category(character) in ("Zs", "Co", "Cn") and code < 0xE0000:
        return character
    if 0xDC80 <= code <= 0xDCFF:  # how Python represents a byte that is not UTF-8
        code -= 0xDC00
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def show(text: object, *, file: TextIO | None = None) -> None:
    """Prints `visible` text at once, on stdout by default.

    The only place that prints.  Characters that the terminal's encoding lacks become
    escapes, too.
    """
    file = sys.stdout if file is None else file
    shown = visible(text)
    encoding = getattr(file, "encoding", None) or "utf-8"
    shown = shown.encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=file, flush=True)
