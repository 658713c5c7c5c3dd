"""Files that appear whole or not at all."""

import os
from pathlib import Path

from jaxpref.errors import InputError


def write_whole(path: str | Path, data: bytes, *, what: str) -> None:
    """Writes under a temporary name beside `path`, then renames.

    Raises:
      InputError: if the file, called `what` in the message, cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(
            f"{path}: cannot write the {what} ({error.strerror}); "
            "free the space or choose another folder"
        ) from error
