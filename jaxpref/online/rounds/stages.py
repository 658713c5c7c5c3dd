"""Which commands of a round are done, and what made their results."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref import __version__
from jaxpref.errors import InputError
from jaxpref.files import write_json
from jaxpref.models.hub import adapter_digest, model_digests
from jaxpref.runtime import processes
from jaxpref.runtime.saved_parts import newest_local_step, read_meta

RECORD, CHECKPOINTS = "stages.json", "checkpoints"
OF_DATA = ("--data", "--eval-data", "--empty-data", "--against", "--prompts")
"""Options whose values may be folders with data."""


class Stages:
    """The finished commands of a folder, in `stages.json`.

    Each has a digest of its words and of all files that they name.  A command whose
    digest is there is not run again.
    """

    def __init__(self, folder: Path):
        """Reads the record, if there is one."""
        self.folder = folder
        path = folder / RECORD
        self._done: dict[str, Any] = {}
        if path.is_file():
            self._done = json.loads(path.read_text("utf-8"))

    def is_done(self, name: str, words: Sequence[str]) -> bool:
        """Whether a command has been run, with the same files.

        Args:
          name: of the command in this folder.
          words: the command without `jaxpref`.

        Raises:
          InputError: if another command, or the same one with other files, has made
            what is there.
        """
        # Other processes may see an older state of a shared file system.
        done = processes.together(lambda: self._is_done(name, words))
        return bool(processes.broadcast_from_process_zero(np.int32(done or 0)))

    def _is_done(self, name: str, words: Sequence[str]) -> bool:
        if (before := self._done.get(name)) is None:
            return False
        if before != (now := _made_by(words)):
            raise InputError(
                f"{self.folder}: {name} was made by another command: "
                f"{_difference(before, now)}; use another --out, or remove the folder "
                "of this round and of the later ones"
            )
        return _out(words).exists()

    def done(self, name: str, words: Sequence[str]) -> None:
        """Records a command that has been run."""
        processes.together(lambda: self._record(name, words))

    def _record(self, name: str, words: Sequence[str]) -> None:
        self._done[name] = _made_by(words)
        write_json(self.folder / RECORD, self._done)


def _made_by(words: Sequence[str]) -> dict[str, Any]:
    """The words, and the digests of the files and folders that they name."""
    out = str(_out(words))
    found, option = {}, ""
    for word in words:
        option = word if word.startswith("--") else option
        # A share or a weight follows the last colon, and log-ratio: names two models.
        for path in (word, word.rpartition(":")[0], *word.split(":")):
            if path and path != out and path not in found:
                digest = digest_of(Path(path), is_data=option in OF_DATA)
                if digest is not None:
                    found[path] = digest
    return {"version": __version__, "command": list(words), "files": found}


def digest_of(path: Path, *, is_data: bool = False) -> str | None:
    """SHA-256 of a file, or of the parts of a folder; None for anything else.

    The parts of a run are the arrays of its newest checkpoint, those of a model or an
    adapter are its own, and those of data are all files.

    Args:
      path: the file or folder.
      is_data: whether a folder holds data.  Otherwise, it is a run, a checkpoint, a
        model or an adapter, or a word that is the name of a folder by accident.

    Raises:
      InputError: if the newest checkpoint of a run is damaged.
    """
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        if not path.is_dir():
            return None
        parts = _files(path) if is_data else _parts(path)
        if parts is None:
            return None
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    except InputError:  # a ValueError, too
        raise
    except (OSError, ValueError):
        return None  # a text that is no path, such as one that is too long


def _files(folder: Path) -> dict[str, Any]:
    """The digests of all files of a folder."""
    files = sorted(x for x in folder.rglob("*") if x.is_file())
    return {x.relative_to(folder).as_posix(): digest_of(x) for x in files}


def _parts(folder: Path) -> dict[str, Any] | None:
    """The digests of a run, a checkpoint, a model or an adapter."""
    checkpoints = folder / CHECKPOINTS
    step = newest_local_step(checkpoints)
    if step is not None:
        return {"checkpoint": read_meta(checkpoints / str(step))["digest"]}
    if folder.parent.name == CHECKPOINTS and folder.name.isdecimal():
        return {"checkpoint": read_meta(folder)["digest"]}
    if (folder / "config.json").is_file():
        return {**model_digests(folder)}
    if (folder / "adapter_config.json").is_file():
        return {"adapter": adapter_digest(folder)}
    return None


def _out(words: Sequence[str]) -> Path:
    return Path(words[list(words).index("--out") + 1])


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two records, in words."""
    if before["command"] != now["command"]:
        pairs = zip(before["command"], now["command"])
        first = next((f"{a} -> {b}" for a, b in pairs if a != b), None)
        return first or "it had another number of options"
    files = before["files"].keys() | now["files"].keys()
    changed = [
        x for x in sorted(files) if before["files"].get(x) != now["files"].get(x)
    ]
    if changed:
        return f"{changed[0]} has changed"
    return f"jaxpref {before['version']} -> {now['version']}"
