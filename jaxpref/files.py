"""Reads and writes files; never writes through a link or over an input."""

import contextlib
import glob
import json
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from jaxpref.errors import InputError

Reads = Mapping[str, str | Path | tuple[str, ...] | None]
"""What a command reads, by option: a path, a pattern, or an ID on the hub."""
RUN, AUDIT, MODEL, DATASET = "a run", "an audit", "a model", "a dataset"
"""What a folder may hold; see `kind_of`."""
LOCK = ".lock"
"""The file that a process locks while it writes to a folder.  It stays there."""
RUN_FILES = (
    *("config.json", "metrics.jsonl", "best.json", "timings.json", "memory.json"),
    *("report.html", "curves.png", "tensorboard", "reference", "checkpoints"),
    *("unreadable", "export", "adapter", "profile", "stopped", "skipped_rows.jsonl"),
    *("loggers.json", "wandb", "mlflow.db", "mlflow"),
    *("samples.jsonl", "eval_samples.jsonl"),
)
"""Names of what a run writes to its folder."""
AUDIT_FILES = (
    *("audit_config.json", "audit.jsonl", "clean.jsonl", "summary.json"),
    *("review.csv", "annotators.csv", "preferences.csv", "skipped_rows.jsonl"),
    *("report.html", "annotators.html", "features"),
)
"""Names of what an audit writes to its folder."""


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes a file atomically: to a temporary name next to `path`, then renamed.

    An existing file keeps its mode.  Links are not followed.

    Raises:
      InputError: if the file cannot be written, or `path` is a folder, a link, a device
        or a read-only file; an existing file stays unchanged.
    """
    path = Path(path)
    before = existing_file(path)
    data = content.encode() if isinstance(content, str) else content
    # A name that nobody can guess, so that nobody can place a link there.
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(partial, flags, 0o666), "wb") as file:
            if before is not None:
                _copy_mode(file.fileno(), before)
            file.write(data)
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def write_json(path: str | Path, content: Any) -> None:
    """Writes a JSON file atomically; raises the same errors as `write_whole`."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def open_to_append(path: Path) -> TextIO:
    """Opens a text file to add lines to it.

    Raises:
      InputError: as `write_whole`.
    """
    existing_file(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    try:
        return open(os.open(path, flags, 0o666), "a", encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from error


def existing_file(path: Path) -> os.stat_result | None:
    """The file at a path that is about to be written; None if there is none.

    Raises:
      InputError: if something other than a writable file is there.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise cannot_write(path, error) from error
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path}: is a folder; give the name of a file")
    if stat.S_ISLNK(found.st_mode):
        raise InputError(
            f"{path}: is a symbolic link to {os.readlink(path)}, and links are not "
            "followed; give the name of the file itself, or remove the link"
        )
    if not stat.S_ISREG(found.st_mode):
        raise InputError(
            f"{path}: is a device, a pipe or a socket; give the name of a file"
        )
    if not found.st_mode & 0o222:
        raise InputError(
            f"{path}: is read-only; make it writable, or choose another file"
        )
    return found


def check_output(flag: str, path: str | Path, reads: Reads) -> None:
    """Checks a file that a command will write, before the command does any work.

    Args:
      flag: the option that names it.
      path: the file; its folder is created if it is missing.
      reads: what the command reads: paths, or IDs on the hub, by option.

    Raises:
      InputError: if it cannot be written, is read by the same command, or is part of a
        run, an audit, a model or a dataset.
    """
    if str(path).endswith(os.sep):
        raise InputError(f"{flag} {path}: is a folder; give the name of a file")
    file = Path(path)
    try:
        existing_file(file)
        for option, given in _on_disk(reads):
            if _same(file, given) or _same(file.parent, given):
                raise InputError(
                    f"is part of {option} {given}, which this command reads; choose "
                    "another file"
                )
        _check_surroundings(file, is_file=True)
        folder = file.parent
        used = any(_inside(given, folder) for _, given in _on_disk(reads))
        if (kind := kind_of(folder)) in (RUN, AUDIT) and not used:
            raise InputError(
                f"is in the folder of {kind} that this command does not read; choose "
                "another place"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            raise PermissionError("no permission to write")
    except InputError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise InputError(f"{flag} {path}: {reason}") from None
    except OSError as error:
        raise cannot_write(f"{flag} {path}", error) from error


def check_output_folder(
    flag: str,
    folder: str | Path,
    writes: Iterable[str],
    reads: Reads,
    *,
    what: str | None = None,
) -> Path:
    """Checks a folder that a command will write to, creates it, and returns it.

    Args:
      flag: the option that names it.
      folder: the folder.
      writes: names of the files and folders that the command writes there.
      reads: what the command reads: paths, or IDs on the hub, by option.
      what: what the folder may hold already: `RUN` or `AUDIT`.

    Raises:
      InputError: if it cannot be used, holds or is part of something else, or if the
        command reads something there that it would overwrite.
    """
    if "://" in str(folder):
        raise InputError(
            f"{flag} {folder}: must be a folder; mount the bucket, for example with "
            "gcsfuse"
        )
    folder = Path(folder)
    try:
        if (found := kind_of(folder)) not in (None, what):
            raise InputError(f"holds {found}; choose another folder")
        for option, given in _on_disk(reads):
            if _same(folder, given):
                raise InputError(
                    f"is {option} {given}, which this command reads; choose another "
                    "folder"
                )
        for path in map(folder.joinpath, writes):
            if path.is_symlink():
                raise InputError(
                    f"{path.name} in it is a symbolic link to {os.readlink(path)}, and "
                    "links are not followed; remove it, or choose another folder"
                )
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise InputError(
                    f"{path.name} in it is a device, a pipe or a socket; remove it, or "
                    "choose another folder"
                )
            for option, given in _on_disk(reads):
                if _same(path, given) or _inside(given, path):
                    raise InputError(
                        f"the command would overwrite {path.name} in it, and reads "
                        f"{option} {given}; choose another folder"
                    )
        _check_surroundings(folder, is_file=False)
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission to write")
        return folder
    except InputError as error:
        raise InputError(f"{flag} {folder}: {error}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {folder}: cannot be used ({error})") from error


def kind_of(folder: Path) -> str | None:
    """What a folder holds: `RUN`, `AUDIT`, `MODEL`, `DATASET`, or None."""
    holds = lambda *names: any((folder / name).is_file() for name in names)
    if holds("audit_config.json"):
        return AUDIT
    if holds("dataset_dict.json", "dataset_info.json", "features.json"):
        return DATASET
    if holds(LOCK) and (folder / "checkpoints").is_dir():
        return RUN  # even before its config is written
    if not holds("config.json"):
        weights = holds("model.safetensors", "model.safetensors.index.json")
        return MODEL if weights or holds("tokenizer.json") else None
    try:
        fields = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if isinstance(fields, dict) and {"model_type", "architectures"} & fields.keys():
        return MODEL
    return RUN if isinstance(fields, dict) and "loss" in fields else None


def _check_surroundings(path: Path, *, is_file: bool) -> None:
    """Refuses a path in one of the folders that a run, model or dataset consists of."""
    parts = RUN_FILES + AUDIT_FILES
    folder, name = path.parent.resolve(), path.name
    if is_file and (kind := kind_of(folder)) in (MODEL, DATASET):
        raise InputError(f"is in the folder of {kind}; choose another place")
    for _ in range(4):  # the deepest is RUN/checkpoints/STEP/state
        if name in parts and (kind := kind_of(folder)) in (RUN, AUDIT):
            raise InputError(f"is part of {kind} in {folder}; choose another place")
        folder, name = folder.parent, folder.name


def _on_disk(reads: Reads) -> Iterable[tuple[str, Path]]:
    """The inputs that are on this disk, by option."""
    for option, given in reads.items():
        several = given if isinstance(given, tuple) else (given,)
        for name in map(str, filter(None, several)):
            bare = name.partition("?")[0]  # FOLDER?split=NAME
            found = [x for x in (name, bare) if os.path.exists(x)][:1]
            for path in found or glob.glob(name, recursive=True):
                yield option, Path(path)


def _same(one: Path, other: Path) -> bool:
    """Whether two paths name the same file or folder, which may not exist yet."""
    if one.exists() and other.exists():
        return os.path.samefile(one, other)
    return one.resolve() == other.resolve()


def _inside(path: Path, folder: Path) -> bool:
    return folder.is_dir() and path.resolve().is_relative_to(folder.resolve())


def _copy_mode(descriptor: int, before: os.stat_result) -> None:
    """Gives an open file the mode of an earlier one and, if permitted, its owner."""
    now = os.fstat(descriptor)
    with contextlib.suppress(OSError):
        if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
            os.fchown(descriptor, before.st_uid, before.st_gid)
    with contextlib.suppress(OSError):  # some file systems have no modes
        os.fchmod(descriptor, stat.S_IMODE(before.st_mode) & 0o777)


def cannot_write(path: str | Path, error: Exception) -> InputError:
    """The error for a file that could not be written."""
    return InputError(
        f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); "
        "free some space or choose another folder"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file of a model folder.

    Raises:
      InputError: if there is no such file, or it contains something else.
    """
    check_regular(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; pass the folder of a Hugging Face model"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); copy it again") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds {type(fields).__name__}, not a JSON object")
    return fields


def check_regular(path: str | Path) -> None:
    """Checks that a file to be read is not a pipe, a device, or a folder.

    Opening a pipe waits for a writer, and a device may never end.  A missing file
    passes: whoever opens it reports it.

    Raises:
      InputError: if it is one of these.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise InputError(f"{path}: is {what}; give a regular file")
