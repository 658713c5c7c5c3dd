"""The cache folder of all runs of a user, which others should not be able to change."""

import contextlib
import logging
import os
import re
from pathlib import Path

from jaxpref.errors import InputError
from jaxpref.files import cannot_write

LIMIT = "JAXPREF_CACHE_LIMIT"
DEFAULT_LIMIT = "20GiB"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})")
_log = logging.getLogger("jaxpref")
_warned: set[Path] = set()


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


def cache_limit() -> int | None:
    """The most bytes of tokenized records that are kept; None for no limit.

    `$JAXPREF_CACHE_LIMIT`, such as 500MiB or 2TiB, or none; 20 GiB by default.

    Raises:
      InputError: if it is not a size.
    """
    given = os.environ.get(LIMIT) or DEFAULT_LIMIT
    if given == "none":
        return None
    found = _SIZE.fullmatch(given)
    if found is None:
        raise InputError(
            f"{LIMIT} {given}: must be a size, such as 500MiB, {DEFAULT_LIMIT} or 2TiB,"
            " or none"
        )
    return int(float(found[1]) * 2 ** (10 * _UNITS.index(found[2])))


def remove_least_recent(folder: Path, suffix: str, *, limit: int) -> tuple[int, int]:
    """Removes the files that were modified first, until the others fit into a limit.

    Several processes may do so at once, and others may have the files open.

    Args:
      folder: where the files are.
      suffix: with which the names of the files end; all others are left.
      limit: the most bytes of those that remain.

    Returns:
      How many files were removed, and their bytes.
    """
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # removed by another process
                if entry.name.endswith(suffix):
                    about = entry.stat()
                    found.append((about.st_mtime_ns, entry.name, about.st_size))
    excess = sum(size for *_, size in found) - limit
    count = removed = 0
    for _, name, size in sorted(found):
        if removed >= excess:
            break
        removed += size
        with contextlib.suppress(OSError):
            (folder / name).unlink()
            count += 1
    return count, removed


def make_private(folder: Path) -> None:
    """Creates a folder, and those above it, that only its owner can write to.

    Raises:
      InputError: if it cannot be created.
    """
    try:
        for missing in reversed([folder, *folder.parents]):
            if not missing.exists():
                with contextlib.suppress(FileExistsError):  # by another process
                    missing.mkdir(mode=0o755)
        folder.mkdir(exist_ok=True)  # raises an error if it is a file
    except OSError as error:
        raise cannot_write(folder, error) from error


def warn_if_others_write(path: Path, *, holds: str) -> None:
    """Warns, once per process, if other users can change a cached file or folder.

    Args:
      path: the file or folder; it need not exist.
      holds: what it holds, for the warning.
    """
    try:
        found = path.stat()
    except OSError:
        return
    if found.st_uid not in (os.geteuid(), 0):
        why, cure = f"belongs to user {found.st_uid}", "use a folder of your own"
    elif found.st_mode & 0o022:
        who = "everyone" if found.st_mode & 0o002 else "its group"
        why, cure = f"can be written by {who}", f"run chmod -R go-w {path}"
    else:
        return
    folder = path if path.is_dir() else path.parent
    if folder not in _warned:
        _warned.add(folder)
        _log.warning(
            "%s: %s, so others can change %s that this command uses; %s, or set "
            "JAXPREF_CACHE to another folder",
            *(path, why, holds, cure),
        )
