"""The cache folder of all runs of a user, which others should not be able to change."""

import contextlib
import logging
import os
from pathlib import Path

from jaxpref.errors import InputError
from jaxpref.files import cannot_write

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
