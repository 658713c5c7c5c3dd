"""Memory: whether arrays and steps fit, what to recompute, what to do otherwise."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpref.errors import OutOfMemory, first_line
from jaxpref.files import write_json
from jaxpref.runtime.processes import broadcast_from_process_zero, log

POLICIES = ("none", "dots", "full")
"""What the backward pass recomputes, from the fastest to the most economical."""
SHARE = 0.9
"""Share of a device's memory that a step may use when a policy is chosen."""
CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Where Linux writes the memory limit of a container, in both versions of cgroups."""

Compile = Callable[[], jax.stages.Compiled]

LESS = (
    "start again with a larger --accumulation, --remat full, a smaller --batch-size, "
    "--row-length or --max-length, or more devices (--mesh.fsdp)"
)
"""What to do if a train step does not fit."""
_needed: dict[str, float] = {}
"""Bytes per device that parts of this process's work need, for messages."""


def choose_remat(out: Path, step_of: Callable[[str], Compile]) -> str:
    """The first of `POLICIES` whose compiled step fits into a device's memory.

    The choice and the sizes are printed and stored in `memory.json`.  A resumed run
    uses the stored choice, because the policies differ in rounding.

    Args:
      out: the run's folder.
      step_of: returns, for a policy, a function that compiles the step.

    Raises:
      OutOfMemory: if the step does not fit with any policy.
    """
    path = out / "memory.json"
    stored = -1
    # Without a config, the files in this folder may belong to another run.
    if jax.process_index() == 0 and (out / "config.json").exists():
        stored = _stored_choice(path)
    stored = int(broadcast_from_process_zero(np.int32(stored)))
    if stored >= 0:
        check_memory(required_bytes(step_of(POLICIES[stored])))
        return POLICIES[stored]
    limit = memory_limit()
    needs: dict[str, float] = {}
    for policy in POLICIES:
        needs[policy] = required_bytes(step_of(policy))
        if needs[policy] <= SHARE * limit:
            break
    check_memory(needs[policy])
    chosen = POLICIES[broadcast_from_process_zero(np.int32(POLICIES.index(policy)))]
    if jax.process_index() == 0:
        listed = ", ".join(f"{name} {_mib(need)}" for name, need in needs.items())
        log(f"remat {chosen}: a step needs {listed} of a device's {_mib(limit)}")
        known = lambda x: x if math.isfinite(x) else None
        sizes = {name: known(need) for name, need in needs.items()}
        found = {"remat": chosen, "step_bytes": sizes, "device_bytes": known(limit)}
        write_json(path, found)
    return chosen


def check_memory(need: float) -> None:
    """Checks that a step fits into a device's memory.

    Args:
      need: bytes, from `required_bytes`.

    Raises:
      OutOfMemory: if it does not fit.
    """
    _needed["a step"] = need
    if need > (limit := memory_limit()) or math.isinf(need):
        raise OutOfMemory(
            f"a step needs {_mib(need)} of memory per device, which has {_mib(limit)}; "
            f"{LESS}"
        )


def check_arrays(what: str, arrays: Any) -> None:
    """Checks that arrays fit into a device's memory, before they are allocated.

    Args:
      what: what they are, for messages: "model: the weights".
      arrays: anything with shapes, dtypes and shardings.

    Raises:
      OutOfMemory: if they do not fit.
    """
    need = _needed[what] = sum(map(_bytes_per_device, jax.tree.leaves(arrays)))
    if need > (limit := memory_limit()):
        raise OutOfMemory(
            f"{what} need {_mib(need)} of memory per device, which has {_mib(limit)}; "
            "use more devices (--mesh.fsdp), a smaller --batch-size or --row-length, a "
            "smaller model, or for training --optimizer adafactor or --param-dtype "
            "bfloat16"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory of the host or of a device ran out."""
    if isinstance(error, (MemoryError, OutOfMemory)):
        return True
    # A connection may also exhaust a resource: the length of a message, or a quota.
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text and not re.search("message larger|quota", text)


def out_of_memory_message(error: BaseException) -> str:
    """One line: what failed, what is needed if known, and what to do."""
    if isinstance(error, OutOfMemory):
        return str(error)
    needs = "".join(
        f"; {what} need{'s' * (what == 'a step')} {_mib(need)} per device"
        for what, need in _needed.items()
    )
    limit = memory_limit()
    of = f", which has {_mib(limit)}" if math.isfinite(limit) and needs else ""
    return f"out of memory ({first_line(error)}){needs}{of}; {LESS}"


def required_bytes(compile_step: Compile) -> float:
    """Bytes per device that a step needs; infinite if the compiler runs out of memory.

        need = arguments + outputs + temporaries - outputs written in place

    0 if the compiler does not report it.
    """
    try:
        return step_bytes(compile_step())
    except jax.errors.JaxRuntimeError as error:
        # TPU compilers refuse a program that does not fit.
        if "RESOURCE_EXHAUSTED" in str(error):
            return math.inf
        raise


def step_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes per device that a compiled program needs; 0 if they are not reported."""
    found: Any = compiled.memory_analysis()
    if found is None:
        return 0
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )


def memory_limit() -> float:
    """Bytes per device; on CPU, its share of the memory of the machine or container.

    Infinite if an accelerator does not report it.
    """
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        return (devices[0].memory_stats() or {}).get("bytes_limit", math.inf)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in CGROUP_LIMITS:
        try:
            machine = min(machine, int(path.read_text()))
        except (OSError, ValueError):
            pass  # not in a container, or "max"
    return machine // len(devices)


def _bytes_per_device(array: Any) -> int:
    sharding = getattr(array, "sharding", None)
    shape = array.shape
    if sharding is not None:
        # Under an abstract mesh, a sharding gives shapes anyway.
        shape = sharding.shard_shape(shape)
    return math.prod(shape) * np.dtype(array.dtype).itemsize


def _mib(size: float) -> str:
    if math.isinf(size):
        return "an unknown amount"
    return f"{size / 2**20:,.0f} MiB"


def _stored_choice(path: Path) -> int:
    """The index of the policy in `memory.json`, or -1 if it cannot be read."""
    try:
        return POLICIES.index(json.loads(path.read_text("utf-8"))["remat"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1  # measured again, with the same result on the same machine
