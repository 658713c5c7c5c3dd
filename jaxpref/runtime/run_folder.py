"""The folder of a run or an audit: who owns it, and that only one process writes."""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from jaxpref.errors import InputError
from jaxpref.files import LOCK, Reads, check_output_folder, existing_file, kind_of
from jaxpref.runtime.processes import together
from jaxpref.runtime.provenance import changed_options, flat

PATIENCE = 3.0
"""Seconds to wait for a lock."""
OTHERS = "checkpoints", "reference", "features"
"""Folders whose files record what they were made with; each file is checked."""

_log = logging.getLogger("jaxpref")
_held: set[int] = set()


@contextlib.contextmanager
def open_out(
    out: str,
    name: str,
    *,
    what: str,
    writes: Collection[str],
    reads: Reads,
) -> Iterator[Path]:
    """Creates the folder OUT, or checks that it can be written, and locks it.

    Args:
      out: the folder.
      name: file name of its config, which the caller checks with `check_config`, and
        writes once something is done.
      what: what the folder holds, `files.RUN` or `files.AUDIT`.
      writes: names of the files and folders that the caller writes there.
      reads: what the caller reads, by option.

    Raises:
      InputError: if OUT cannot be used, or another process writes to it.
    """
    folder = check_output_folder("--out", out, writes, reads, what=what)
    together(lambda: _check_foreign(folder, name, writes, what))
    with locked(folder):
        yield folder


@contextlib.contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Locks a folder, on process 0, until the end of the block or of the process.

    On file systems without locks, it warns and continues.

    Args:
      folder: the folder.
      name: the name of the lock's file.  `LOCK` also says that a run or an audit has
        been here.

    Raises:
      InputError: on all processes, if another process has the lock; it is named.
    """
    descriptor = together(lambda: _lock(folder / name))
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
            _held.discard(descriptor)
            os.close(descriptor)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock; None if the file system has no locks."""
    existing_file(path)  # raises an error if it is a link or a device
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be opened ({error.strerror}); remove it if nothing uses "
            "the folder"
        ) from error
    try:
        _wait_for_lock(descriptor)
    except BlockingIOError:
        holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace")
        os.close(descriptor)
        raise InputError(
            f"--out {path.parent}: {_holder(holder)} is writing to it; wait until it "
            "ends, or choose another --out"
        ) from None
    except OSError as error:
        os.close(descriptor)
        _log.warning(
            "%s: this file system has no locks (%s); make sure that no other process "
            "writes to this folder",
            *(path.parent, error.strerror),
        )
        return None
    about = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(about).encode(), 0)
    _held.add(descriptor)
    return descriptor


def _wait_for_lock(descriptor: int) -> None:
    """Locks a file; a killed process keeps its lock until its memory is freed."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.1)


def _holder(text: str) -> str:
    """The process that has the lock, from the text that it wrote."""
    try:
        about = json.loads(text)
        return (
            f"process {int(about['pid'])} on {str(about['host'])[:100]!r} (since "
            f"{str(about['since'])[:30]})"
        )
    except (ValueError, KeyError, TypeError):
        return "another process"


def _forget_in_child() -> None:
    # A forked child shares the lock, and would keep it if this process were killed.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def check_config(
    folder: Path,
    name: str,
    asked: dict[str, Any],
    *,
    what: str,
    may_change: Collection[str],
) -> None:
    """Checks that a folder has no config yet, or the same one.

    Args:
      folder: the folder.
      name: file name of its config.
      asked: the requested config, as JSON would decode it.
      what: what the folder holds, `files.RUN` or `files.AUDIT`.
      may_change: fields that may differ from the stored config; `a.b` is the field b of
        the object in field a.

    Raises:
      InputError: if its config cannot be read or differs; the message names the fields.
    """
    path = folder / name
    try:
        before = json.loads(path.read_text("utf-8")) if path.exists() else asked
        if not isinstance(before, dict):
            raise ValueError("not an object")
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be used ({error})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not the config of {what} ({error}); put it back, or use another "
            "--out"
        ) from error
    if missing := sorted(asked.keys() - before.keys() - {*may_change}):
        raise InputError(
            f"{folder} holds {what} begun by an earlier version, without the option "
            f"{missing[0]}; use that version to resume, or another --out"
        )
    if changed := changed_options(flat(before), flat(asked), but=may_change):
        raise InputError(
            f"{folder} holds {what} with another config; changed: {', '.join(changed)}."
            " Use the same options to resume, or another --out"
        )


def _check_foreign(folder: Path, name: str, writes: Collection[str], what: str) -> None:
    """Refuses a folder with files that would be overwritten and are not from here."""
    if (folder / name).exists() or kind_of(folder) == what:
        return
    if found := [x for x in writes if x not in OTHERS and (folder / x).exists()]:
        raise InputError(
            f"--out {folder}: has {', '.join(found)}, but no {name} of {what}; the "
            "command would overwrite it; choose another folder"
        )
