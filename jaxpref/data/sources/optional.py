"""Packages that only some sources need, imported when such a source is opened."""

import importlib
from typing import Any

from jaxpref.errors import InputError


def import_pyarrow(name: str) -> Any:
    """The package `pyarrow`, to read what `name` names."""
    return import_optional("pyarrow", name, extra="hub")


def import_optional(package: str, name: str, *, extra: str) -> Any:
    """A package that is installed with one of our extras.

    Args:
      package: what to import.
      name: what is to be read, for the error.
      extra: the extra that installs the package.

    Raises:
      InputError: if it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(
            f"{name}: needs the package `{package.partition('.')[0]}`;"
            f' pip install "jaxpref[{extra}]"'
        ) from None
