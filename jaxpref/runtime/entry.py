"""Setup and error handling shared by every entry point."""

import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

import jax

from jaxpref.errors import DIVERGED, InputError, Stopped
from jaxpref.runtime.compilation import enable_compilation_cache
from jaxpref.runtime.malloc import reuse_freed_memory
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


@contextlib.contextmanager
def entry_point() -> Iterator[None]:
    """Joins the run's other processes and turns exceptions into exit codes.

    Also enables the compilation cache (`enable_compilation_cache`) and the reuse of
    freed memory (`reuse_freed_memory`).  Every error is reported in one line.

    Exit codes:
      1: an error of a disk or a connection that may disappear on a retry; a supervisor
        restarts the run.
      2: invalid input.
      65: the run stopped itself because too many steps went wrong (`guard`).
      130: interrupted by Ctrl-C, or by SIGTERM outside training.
      143: SIGTERM during training, after the last step was saved (`preemption`).
    """
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
        print(f"jaxpref: {preempted}", file=sys.stderr, flush=True)
        sys.exit(PREEMPTED)
    except Stopped as stopped:
        print(f"jaxpref: error: {stopped}", file=sys.stderr, flush=True)
        sys.exit(DIVERGED)  # a normal exit too: all processes stop at the same step
    except InputError as error:
        fail(str(error))
    except OSError as error:
        message = f"{error.filename or 'I/O'}: {error.strerror or error}"
        fail(message, code=1 if error.errno in TRANSIENT else 2)
    except KeyboardInterrupt:
        fail("interrupted; the same command resumes", code=130)


def fail(message: str, *, code: int = 2) -> NoReturn:
    """Prints one line to stderr and ends the process."""
    print(f"jaxpref: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        # A normal exit would wait for the other processes, which wait for this one.
        os._exit(code)
    sys.exit(code)
