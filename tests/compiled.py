"""Counting compiled programs.

`_cache_size` of a jitted function counts entries of a cache that all functions share,
and in a long process other tests push them out.  JAX's own events forget nothing.
"""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def compiled(name: str) -> Iterator[list[str]]:
    """A list of the programs compiled of the function `name`, which grows meanwhile."""
    programs = []

    def listen(event, seconds, *, fun_name="", **_):
        if event.endswith("/backend_compile_duration") and fun_name == f"jit({name})":
            programs.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield programs
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
