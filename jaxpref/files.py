"""Files that appear whole or not at all, and the folder that runs share."""

import json
import os
from collections.abc import Collection
from pathlib import Path

from jaxpref.errors import InputError


def cache_folder() -> Path:
    """Where all runs of this user keep what is worth computing once.

    `$JAXPREF_CACHE`; else `jaxpref` in `$XDG_CACHE_HOME`, else in `~/.cache`.  All of
    it can be deleted at any time: it is made again.

    Raises:
      InputError: if there is no home folder, or what is given is no folder.
    """
    if given := os.environ.get("JAXPREF_CACHE"):
        if "://" in given:
            raise InputError(
                f"JAXPREF_CACHE {given}: only folders are read and written; mount the "
                "bucket, for example with gcsfuse. Compiled programs alone may lie in "
                f"one: JAX_COMPILATION_CACHE_DIR={given}"
            )
        folder = Path(os.path.expanduser(given)).absolute()
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = Path(base) / "jaxpref"
    if not folder.is_absolute():
        raise InputError(
            f"{folder}: no folder for what runs share; set JAXPREF_CACHE to one"
        )
    return folder


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes under a temporary name beside `path`, then renames.

    Raises:
      InputError: if it cannot be written; what was there before is untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    data = content.encode() if isinstance(content, str) else content
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def write_json(path: str | Path, content) -> None:
    """Writes a JSON file whole or not at all; errors as `write_whole`."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def open_out(
    out: Path, name: str, asked: dict, *, what: str, may_change: Collection[str]
) -> None:
    """Makes the folder OUT, or finds in it what was begun with the same config.

    Args:
      out: the folder.
      name: of its config file, which the caller writes.
      asked: the config, as JSON would give it back.
      what: lies in the folder, for messages: "a run".
      may_change: fields that do not bind the folder.

    Raises:
      InputError: if OUT cannot be written, its config cannot be read, or differs; the
        message names the fields.
    """
    path = out / name
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError("no permission to write")
        before = json.loads(path.read_text("utf-8")) if path.exists() else asked
        if not isinstance(before, dict):
            raise ValueError("not an object")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be used ({error})") from error
    except ValueError as error:
        raise InputError(
            f"{path}: not the config of {what} ({error}); put it back, or use another "
            "--out"
        ) from error
    changed = [
        f"{name} ({before.get(name)!r} -> {asked.get(name)!r})"
        for name in sorted(before.keys() | asked.keys())
        if before.get(name) != asked.get(name) and name not in may_change
    ]
    if changed:
        raise InputError(
            f"{out} holds {what} of another config; changed: {', '.join(changed)}. Use "
            "the same options to resume, or another --out"
        )


def cannot_write(path: str | Path, error: OSError) -> InputError:
    """The error of a file that could not be written."""
    return InputError(
        f"{path}: cannot be written ({error.strerror or error}); make room or choose "
        "another folder"
    )
