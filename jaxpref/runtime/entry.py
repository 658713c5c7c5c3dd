"""What every entry point does around its work."""

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

PASSING = {
    getattr(errno, name)
    for name in (
        *("EIO", "EREMOTEIO", "ESTALE", "ENOTCONN", "EPIPE", "ETIMEDOUT", "EAGAIN"),
        *("EBUSY", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EHOSTUNREACH"),
        *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EINTR"),
    )
    if hasattr(errno, name)
}
"""Errors of the system that are not of what the user gave."""


@contextlib.contextmanager
def entry_point() -> Iterator[None]:
    """Joins the run's other processes; wrong input becomes one line and exit code 2.

    Compiled programs are kept for later processes (`enable_compilation_cache`), and
    freed memory for later steps (`reuse_freed_memory`).

    An interrupt (Ctrl-C, SIGTERM) becomes one line and exit code 130; a SIGTERM while
    it trains one line and exit code 143, once the last step is saved (`preemption`).
    A run that stopped itself, because its steps went wrong, becomes one line and exit
    code 65 (`guard`).  An error of a disk or a connection that may be over the next
    time becomes one line and exit code 1, after which a supervisor tries again.
    """
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    # A write that fails is raised and told in one line; Orbax would also log it, once
    # for every array and with its traceback.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    reuse_freed_memory()
    try:
        initialize_distributed()
        enable_compilation_cache()
        # After jax.distributed, which would note a SIGTERM and carry on.
        jax_handler()  # is remembered for the time in which it trains
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield
    except Preempted as preempted:
        # In order: all processes end here, and wait until each has saved its part.
        print(f"jaxpref: {preempted}", file=sys.stderr, flush=True)
        sys.exit(PREEMPTED)
    except Stopped as stopped:
        print(f"jaxpref: error: {stopped}", file=sys.stderr, flush=True)
        sys.exit(DIVERGED)  # in order too: all have judged the same steps
    except InputError as error:
        fail(str(error))
    except OSError as error:
        message = f"{error.filename or 'I/O'}: {error.strerror or error}"
        fail(message, code=1 if error.errno in PASSING else 2)
    except KeyboardInterrupt:
        fail("interrupted; the same command resumes", code=130)


def fail(message: str, *, code: int = 2) -> NoReturn:
    """Prints one line to stderr and ends the process."""
    print(f"jaxpref: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        # An orderly exit would wait for the other processes, which wait for this one.
        os._exit(code)
    sys.exit(code)
