"""Which commands of a round are done, and what made their results."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpref import __version__
from jaxpref.errors import InputError
from jaxpref.files import write_json
from jaxpref.models.hub import model_digests
from jaxpref.runtime import processes

RECORD = "stages.json"


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
        self._done[name] = _made_by(words)
        record = lambda: write_json(self.folder / RECORD, self._done)
        processes.together(record)


def _made_by(words: Sequence[str]) -> dict[str, Any]:
    """The words, and the digests of the files and folders that they name."""
    out = str(_out(words))
    found = {}
    for word in words:
        for path in (word, *word.split(":")):
            if path and path != out and path not in found:
                if (digest := digest_of(Path(path))) is not None:
                    found[path] = digest
    return {"version": __version__, "command": list(words), "files": found}


def digest_of(path: Path) -> str | None:
    """SHA-256 of a file, or of a model folder's parts; None for anything else."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        if (path / "config.json").is_file():
            parts = json.dumps(model_digests(path), sort_keys=True)
            return hashlib.sha256(parts.encode()).hexdigest()
    except (OSError, ValueError):
        pass  # a text that is no path, such as one that is too long
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
