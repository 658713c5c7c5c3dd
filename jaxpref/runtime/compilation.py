"""Compilation: a cache shared by processes, work in the background, and a log."""

import collections
import concurrent.futures
import contextlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
from tqdm import tqdm

from jaxpref.errors import InputError, visible
from jaxpref.runtime.cache_folder import (
    cache_folder,
    make_private,
    warn_if_others_write,
)

Result = TypeVar("Result")

HOLDS = "the compiled programs"
"""What the cache holds, for warnings."""

_in_background: set[concurrent.futures.Future] = set()


def enable_compilation_cache() -> None:
    """Caches compiled programs on disk for later processes.

    The cache is `compiled/` in the cache folder.  It includes small programs, of which
    a process compiles dozens on CPU.  `JAX_COMPILATION_CACHE_DIR` names another folder
    or a bucket (`gs://BUCKET/FOLDER`); jax then caches only programs that took at least
    a second to compile.  An empty value disables the cache.  jax keys the programs by
    their code, flags, versions, and processor.  Only process 0 writes.

    Raises:
      InputError: if there is no home folder, or no package that can access the bucket.
    """
    # jax declares its options at run time.
    given = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if given is not None:
        # Without one of these, jax warns once and recompiles everything at every start.
        clients = map(importlib.util.find_spec, ("gcsfs", "tensorflow"))
        if given.startswith("gs://") and not any(clients):
            raise InputError(
                f"JAX_COMPILATION_CACHE_DIR {given}: a bucket requires gcsfs, which is "
                'not installed; pip install gcsfs or "jaxpref[tpu]"'
            )
        if given and "://" not in given:
            warn_if_others_write(Path(given), holds=HOLDS)
        return
    folder = cache_folder() / "compiled"
    with contextlib.suppress(InputError):  # jax warns if it cannot write there
        make_private(folder)
    warn_if_others_write(folder, holds=HOLDS)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def in_background(
    compile_program: Callable[[], Result],
) -> concurrent.futures.Future[Result]:
    """Compiles in a thread; returns the future of what `compile_program` returns.

    XLA does not hold Python's lock while it compiles.  A process that exits waits for
    the thread, unless it ends with `os._exit`, as the command line does.
    """
    pool = concurrent.futures.ThreadPoolExecutor(1)
    compiling = pool.submit(compile_program)
    pool.shutdown(wait=False)
    _in_background.add(compiling)
    compiling.add_done_callback(_in_background.discard)
    return compiling


def is_compiling() -> bool:
    """Whether a program is being compiled in the background."""
    return bool(_in_background)


@contextlib.contextmanager
def log_compilations() -> Iterator[None]:
    """Prints a line for every program compiled inside the context, and a total.

    A line has the program's name and compile time, whether it was compiled or read from
    the cache on disk, and the number and shapes of its arguments.  The shapes come from
    jax's log, the only place that has them.
    """
    arguments = {}
    hits: set[int] = set()  # by thread, since two may compile at once
    counts: collections.Counter[str] = collections.Counter()
    seconds: dict[str, float] = collections.defaultdict(float)

    class Log(logging.Handler):
        def emit(self, record):
            if record.levelno >= logging.WARNING:
                logging.getLogger().handle(record)
            elif str(record.msg).startswith("Compiling "):
                name, avals = cast(tuple[Any, ...], record.args)[:2]
                arguments[name] = collections.Counter(a.str_short() for a in avals)

    def hit(event, **_):
        if event.endswith("/cache_hits"):
            hits.add(threading.get_ident())

    def compiled(event: str, duration_secs: float, **about: str | int) -> None:
        if not event.endswith("/backend_compile_duration"):
            return
        thread = threading.get_ident()
        origin = "from the cache" if thread in hits else "compiled"
        hits.discard(thread)
        counts[origin] += 1
        seconds[origin] += duration_secs
        fun_name = str(about.get("fun_name", ""))
        shapes = arguments.pop(fun_name, {})
        shapes = ", ".join(f"{n} x {s}" if n > 1 else s for s, n in shapes.items())
        line = f"{origin} in {duration_secs:.2f} s: {fun_name} of {shapes or '-'}"
        tqdm.write(visible(line))

    logger, log = logging.getLogger("jax"), Log()
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(log)
    jax.monitoring.register_event_listener(hit)
    jax.monitoring.register_event_duration_secs_listener(compiled)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_listener(hit)
        jax.monitoring.unregister_event_duration_listener(compiled)
        logger.removeHandler(log)
        logger.setLevel(before[0])
        logger.propagate = before[1]
        for origin, count in counts.items():
            line = f"{count} programs {origin} in {seconds[origin]:.1f} s"
            tqdm.write(visible(line))
