"""Exceptions that the command line reports, and how text reaches the terminal."""

import difflib
import sys
import unicodedata
from collections.abc import Iterable
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


def closest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """The end of a message, "; did you mean NAME?"; empty if no name is similar."""
    names = list(names)
    last = name.rpartition(".")[2]
    # `--flip-rate` for `--loss.flip-rate`: the namespace was forgotten.
    near = [n for n in names if n.rpartition(".")[2] == last]
    if not near:
        near = difflib.get_close_matches(name, names, n=4, cutoff=0.6)
        # Swapped letters (rdop for rdpo) come before changed letters (ropo).
        near = sorted(near, key=lambda n: sorted(n) != sorted(name))[:1]
    listed = " or ".join(prefix + n for n in near)
    return f"; did you mean {listed}?" if near else ""


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

    Characters that the terminal's encoding lacks become escapes, too.
    """
    out = file or sys.stdout
    print(_encodable(visible(text), out), file=out, flush=True)


COLORS = {"blue": 34, "green": 32, "magenta": 35}
"""The colors of `paint`, as the terminal knows them."""


def paint(parts: Iterable[tuple[str, str]], *, file: TextIO | None = None) -> None:
    """Prints `visible` texts in colors, with nothing between them.

    The only other place that prints, besides `show`.

    Args:
      parts: texts, and names in `COLORS`.
      file: a terminal, by default on stdout.
    """
    out = file or sys.stdout
    shown = [
        f"\x1b[{COLORS[color]}m{_encodable(visible(text), out)}\x1b[0m"
        for text, color in parts
    ]
    print("".join(shown), file=out, flush=True)


def _encodable(text: str, file: TextIO) -> str:
    encoding = getattr(file, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
