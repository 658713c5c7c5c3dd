"""Completions that an interrupted `jaxpref sample` has finished, next to its output."""

import dataclasses
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import jax

from jaxpref.errors import InputError
from jaxpref.files import cannot_write
from jaxpref.runtime.environment import environment, versions

_START = b'{"key": "'


@dataclasses.dataclass(frozen=True)
class Unfinished:
    """The finished completions of one command.

    They are lines of JSON in a file that only its owner can write.  Each names the
    command it belongs to by a digest, so lines of another command, and a line that was
    cut off, are ignored.  The random numbers of a completion do not depend on the
    others, so a resumed command gives the completions of an uninterrupted one.  (The
    last bits of its logits may differ, because other completions share the batch; that
    changes a token only where two are equally good to rounding.)
    """

    path: Path | None
    """The file; None if nothing is kept."""
    key: str
    """Digest of everything that the completions depend on."""
    completions: dict[int, dict[str, Any]]
    """Completions by number."""

    def get(self, number: int) -> dict[str, Any] | None:
        """The kept completion with this number; None if there is none."""
        return self.completions.get(number)

    def add(self, number: int, completion: dict[str, Any]) -> None:
        """Keeps a completion.

        Raises:
          InputError: if the file cannot be written.
        """
        if self.path is None:
            return
        record = {"key": self.key, "number": number, "completion": completion}
        try:
            # After a line that was cut off, the newline begins another.
            _append(self.path, b"\n" + json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def remove(self) -> None:
        """Deletes the file; the output is written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def unfinished(
    out: str | None, asked: dict[str, Any], folder: Path, mesh: jax.sharding.Mesh
) -> Unfinished:
    """What an earlier, interrupted start of the same command has finished.

    Args:
      out: the command's output; None if it prints, and nothing is kept.
      asked: the options and the prompts.
      folder: the model.
      mesh: the mesh of devices.

    Raises:
      InputError: if the file next to the output was not written by this command.
    """
    if out is None:
        return Unfinished(None, "", {})
    depends = {
        "asked": asked,
        "model": {x.name: _digest(x) for x in folder.iterdir() if x.is_file()},
        "software": versions(),
        "environment": environment(mesh),
    }
    text = json.dumps(depends, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    # Of several processes, each keeps its own.
    own = f".{jax.process_index()}" if jax.process_count() > 1 else ""
    path = Path(out).with_name(f".{Path(out).name}{own}.unfinished")
    return Unfinished(path, key, _read(path, key))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, key: str) -> dict[int, dict[str, Any]]:
    """The completions of the command with this key."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return {}
    except OSError as error:  # a link, for example
        raise _foreign(path) from error
    about = os.fstat(descriptor)
    # Others could have written completions of their own.
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
        os.close(descriptor)
        raise _foreign(path)
    with open(descriptor, "rb") as file:
        lines = [line for line in file.read().split(b"\n") if line]
    if lines and not (lines[0].startswith(_START) or _START.startswith(lines[0])):
        raise _foreign(path)
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line)
            if record["key"] == key and isinstance(record["completion"], dict):
                found[record["number"]] = record["completion"]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # cut off when the command was killed, or damaged
    return found


def _append(path: Path, line: bytes) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o600), "ab") as file:
        file.write(line)


def _foreign(path: Path) -> InputError:
    return InputError(
        f"{path}: finished completions are kept here, but this file was not written by "
        "your `jaxpref sample`; move it away, or use another --out"
    )
