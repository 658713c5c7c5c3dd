"""What a step needs of a device's memory, and what is recomputed to make it fit."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpref.files import write_json
from jaxpref.runtime.processes import broadcast_from_process_zero

POLICIES = ("none", "dots", "full")
"""What the backward pass recomputes, from the fastest to the one that needs least."""
SHARE = 0.9
"""Of a device's memory, for a step; the rest is for what comes beside it."""


def choose_remat(out: Path, compiled: Callable[[str], jax.stages.Compiled]) -> str:
    """The first of `POLICIES` whose step fits, as the compiled program states its need.

        need = arguments + outputs + temporaries - outputs written in place

    All figures are of one device; the choice, and what was found, is printed and kept
    in `memory.json`.  A run that is resumed goes on with what stands there, since the
    policies differ in rounding.  Where nothing fits, the last is taken.

    Args:
      out: folder of the run.
      compiled: makes the step of a policy.
    """
    path = out / "memory.json"
    remembered = -1
    # Without a config the folder is nobody's yet: what lies there may be of another.
    if jax.process_index() == 0 and (out / "config.json").exists():
        remembered = _remembered(path)
    remembered = int(broadcast_from_process_zero(np.int32(remembered)))
    if remembered >= 0:
        return POLICIES[remembered]
    limit = memory_limit()
    needs = {}
    for policy in POLICIES:
        needs[policy] = step_bytes(compiled(policy))
        if needs[policy] <= SHARE * limit:
            break
    chosen = POLICIES[broadcast_from_process_zero(np.int32(POLICIES.index(policy)))]
    if jax.process_index() == 0:
        mib = lambda size: f"{size / 2**20:,.0f} MiB"
        listed = ", ".join(f"{name} {mib(need)}" for name, need in needs.items())
        verdict = "" if needs[policy] <= SHARE * limit else ", though it may not fit"
        print(
            f"remat {chosen}{verdict}: a step needs {listed} of a device's "
            f"{mib(limit)}",
            flush=True,
        )
        write_json(path, {"remat": chosen, "step_bytes": needs, "device_bytes": limit})
    return chosen


def _remembered(path: Path) -> int:
    """The number of the policy that `memory.json` names, -1 if none can be read."""
    try:
        return POLICIES.index(json.loads(path.read_text("utf-8"))["remat"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1  # measured again, to the same figures on the same machine


def step_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of one device that a compiled program needs."""
    found: Any = compiled.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )


def memory_limit() -> int:
    """Bytes of one device: its own, or its share of the machine's memory."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine // len(devices)
