"""Files at a URL, copied to a temporary folder before they are read.

`fsspec` reads https:// and, with the package for the service, gs:// and s3://.
"""

import atexit
import functools
import re
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from jaxpref.data.sources.optional import import_optional
from jaxpref.errors import InputError, first_line

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")


def is_url(name: str) -> bool:
    """Whether a name is a URL: "gs://bucket/pairs.jsonl"."""
    return _URL.match(name) is not None


def find_urls(url: str) -> list[str]:
    """The URLs that match one with * or [...]; the URL itself without them.

    Raises:
      InputError: if none matches, or the service cannot be asked.
    """
    if not {"*", "["} & set(url):
        return [url]
    system, path = _system(url)
    try:
        found = sorted(system.glob(path))
    except Exception as error:  # each service has its own
        raise _unreadable(url, error) from None
    if not found:
        raise InputError(f"{url}: no file matches")
    return [system.unstrip_protocol(name) for name in found]


def copied(url: str) -> Path:
    """A copy of the file at a URL, which is removed when the process ends.

    Raises:
      InputError: if it cannot be copied, or the package for the service is missing.
    """
    system, path = _system(url)
    folder = Path(tempfile.mkdtemp(dir=_copies()))
    copy = folder / (PurePosixPath(url.partition("?")[0]).name or "file")
    try:
        system.get_file(path, str(copy))
    except Exception as error:
        raise _unreadable(url, error) from None
    return copy


def _system(url: str) -> tuple[Any, str]:
    fsspec = import_optional("fsspec", url, extra="hub")
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise InputError(f"{url}: {first_line(error)}") from None
    except ValueError as error:
        raise _unreadable(url, error) from None


@functools.cache
def _copies() -> str:
    folder = tempfile.mkdtemp(prefix="jaxpref-data-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _unreadable(url: str, error: Exception) -> InputError:
    why = first_line(error) or type(error).__name__
    return InputError(f"{url}: cannot be read ({why}); check the URL and the network")
