"""Atomic file writes, the cache folder, and opening the folder of a run."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxpref.errors import InputError


def cache_folder() -> Path:
    """The cache folder shared by all runs of this user.

    `$JAXPREF_CACHE` if set; otherwise `jaxpref` in `$XDG_CACHE_HOME` or `~/.cache`.  It
    can be deleted at any time; its contents are recreated.

    Raises:
      InputError: if there is no home folder, or `JAXPREF_CACHE` is not a folder.
    """
    if given := os.environ.get("JAXPREF_CACHE"):
        if "://" in given:
            raise InputError(
                f"JAXPREF_CACHE {given}: must be a folder; mount the bucket, for "
                "example with gcsfuse. A bucket can cache only compiled programs: "
                f"JAX_COMPILATION_CACHE_DIR={given}"
            )
        folder = Path(os.path.expanduser(given)).absolute()
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = Path(base) / "jaxpref"
    if not folder.is_absolute():
        raise InputError(
            f"{folder}: not usable as the cache folder; set JAXPREF_CACHE to a folder"
        )
    return folder


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes a file atomically: to a temporary name next to `path`, then renamed.

    Raises:
      InputError: if the file cannot be written; an existing file stays unchanged.
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


def write_json(path: str | Path, content: Any) -> None:
    """Writes a JSON file atomically; raises the same errors as `write_whole`."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def open_out(
    out: Path, name: str, asked: dict, *, what: str, may_change: Collection[str]
) -> None:
    """Creates the folder OUT, or checks that it was created with the same config.

    Args:
      out: the folder.
      name: file name of its config, which the caller writes.
      asked: the requested config, as JSON would decode it.
      what: what the folder holds, for messages: "a run".
      may_change: fields that may differ from the stored config.

    Raises:
      InputError: if OUT cannot be written, or if its config cannot be read or differs;
        the message names the fields.
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
            f"{out} holds {what} with another config; changed: {', '.join(changed)}. "
            "Use the same options to resume, or another --out"
        )


def cannot_write(path: str | Path, error: OSError) -> InputError:
    """The error for a file that could not be written."""
    return InputError(
        f"{path}: cannot be written ({error.strerror or error}); free some space or "
        "choose another folder"
    )
