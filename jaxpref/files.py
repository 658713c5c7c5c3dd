"""Files that appear whole or not at all."""

import json
import os
from pathlib import Path

from jaxpref.errors import InputError


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


def cannot_write(path: str | Path, error: OSError) -> InputError:
    """The error of a file that could not be written."""
    return InputError(
        f"{path}: cannot be written ({error.strerror or error}); make room or choose "
        "another folder"
    )
