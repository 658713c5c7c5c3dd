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


@contextlib.contextmanager
def programs() -> Iterator[list[tuple[str, bool]]]:
    """A list that grows meanwhile: each program, and whether it came from the disk."""
    found, hits = [], []

    def hit(event, **_):
        if event.endswith("/cache_hits"):
            hits.append(event)

    def listen(event, seconds, *, fun_name="", **_):
        if event.endswith("/backend_compile_duration"):
            found.append((fun_name, bool(hits)))
            hits.clear()

    jax.monitoring.register_event_listener(hit)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(hit)
        jax.monitoring.unregister_event_duration_listener(listen)
