"""Setup and error handling shared by every entry point."""

import contextlib
import errno
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax

from jaxpref.errors import (
    DIVERGED,
    OUT_OF_MEMORY,
    InputError,
    Stopped,
    first_line,
    show,
    visible,
)
from jaxpref.runtime.compilation import enable_compilation_cache
from jaxpref.runtime.malloc import reuse_freed_memory
from jaxpref.runtime.memory import is_out_of_memory, out_of_memory_message
from jaxpref.runtime.mesh import initialize_distributed
from jaxpref.runtime.preemption import PREEMPTED, Preempted, jax_handler

TRANSIENT = {
    getattr(errno, name)
    for name in (
        *("EIO", "EREMOTEIO", "ESTALE", "ENOTCONN", "EPIPE", "ETIMEDOUT", "EAGAIN"),
        *("EBUSY", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EHOSTUNREACH"),
        *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EINTR"),
    )
    if hasattr(errno, name)
}
"""Operating system errors that may disappear on a retry."""
_formatwarning = warnings.formatwarning


DEBUG = "JAXPREF_DEBUG"
"""Environment variable; if it is set, tracebacks are printed too."""


@contextlib.contextmanager
def entry_point(out: Path | None = None, *, resumes: bool = True) -> Iterator[None]:
    """Joins the run's other processes and turns exceptions into exit codes.

    Also enables the compilation cache (`enable_compilation_cache`) and the reuse of
    freed memory (`reuse_freed_memory`).  Every error is reported in one line.  The
    traceback of an unexpected error is written to a file, which the line names.

    Args:
      out: the run's folder, for the traceback; before the run has begun, a temporary
        folder is used.
      resumes: whether the command, if interrupted, keeps what it has done.

    Exit codes:
      1: an error that may disappear on a retry, such as a disk or connection error,
        or an unexpected error; a supervisor restarts the run.
      2: invalid input.
      65: the run stopped itself because too many steps went wrong (`guard`), or because
        nothing was learned.
      66: out of memory.
      130: interrupted by Ctrl-C, or by SIGTERM outside training.
      143: SIGTERM during training, after the last step was saved (`preemption`).
    """
    _filter_logs()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    # A failed write is reported in one line.  Orbax would also log it, once for every
    # array and with a traceback.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    reuse_freed_memory()
    try:
        initialize_distributed()
        enable_compilation_cache()
        # After jax.distributed, whose handler would only record a SIGTERM.
        jax_handler()  # caches that handler for use during training
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield
    except Preempted as preempted:
        # A normal exit: all processes end here, once each has saved its part.
        show(f"jaxpref: {preempted}", file=sys.stderr)
        sys.exit(PREEMPTED)
    except Stopped as stopped:
        show(f"jaxpref: error: {stopped}", file=sys.stderr)
        sys.exit(DIVERGED)  # a normal exit too: all processes stop at the same step
    except KeyboardInterrupt:
        again = "resumes" if resumes else "starts over"
        fail(f"interrupted; the same command {again}", code=130)
    except Exception as error:
        message, code = explained(error, out)
        fail(message, code=code)


def explained(error: Exception, out: Path | None) -> tuple[str, int]:
    """The message for an error, and the exit code of `entry_point`.

    Args:
      error: the error.
      out: the run's folder, for the traceback of an unexpected error.
    """
    _debug(error)
    if isinstance(error, Stopped):
        return str(error), DIVERGED
    if is_out_of_memory(error):
        return out_of_memory_message(error), OUT_OF_MEMORY
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, OSError):
        message = f"{error.filename or 'I/O'}: {error.strerror or error}"
        return message, 1 if error.errno in TRANSIENT else 2
    if isinstance(error, subprocess.CalledProcessError):  # it has said why
        command = error.cmd if isinstance(error.cmd, str) else shlex.join(error.cmd)
        return f"the command failed: {command}", max(error.returncode, 1)
    what = f"{type(error).__name__}: {first_line(error)}"
    return f"unexpected {what}; {_log(error, out)}", 1


def _debug(error: Exception) -> None:
    if os.environ.get(DEBUG):
        show("".join(traceback.format_exception(error)), file=sys.stderr)


def _log(error: Exception, out: Path | None) -> str:
    """Writes the traceback to a new file; says where it is."""
    text = "".join(traceback.format_exception(error))
    run = out if out is not None and (out / "config.json").is_file() else None
    for folder in (run, None):
        try:
            number, path = tempfile.mkstemp(".log", "jaxpref-error-", folder)
            with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError:
            continue
        return f"the traceback is in {path}; please report it"
    return f"{DEBUG}=1 shows the traceback; please report it"


class VisibleRecord(logging.LogRecord):
    """A log record whose text is `visible`, whichever package logs it."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if self.exc_info and self.exc_info[0] is not None:
            formatted = logging.Formatter().formatException(self.exc_info)
            self.exc_text = visible(formatted)

    def getMessage(self) -> str:  # noqa: D102, N802
        return visible(super().getMessage())


def _filter_logs() -> None:
    """Makes log lines and warnings of every package `visible`."""
    logging.setLogRecordFactory(VisibleRecord)
    if warnings.formatwarning is not _visible_warning:
        warnings.formatwarning = _visible_warning


def _visible_warning(*args: Any, **options: Any) -> str:
    return visible(_formatwarning(*args, **options))


def fail(message: str, *, code: int = 2) -> NoReturn:
    """Prints one line to stderr and ends the process."""
    show(f"jaxpref: error: {' '.join(message.split())}", file=sys.stderr)
    if jax.distributed.is_initialized():
        # A normal exit would wait for the other processes, which wait for this one.
        os._exit(code)
    sys.exit(code)
