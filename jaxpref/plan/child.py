"""The process that compiles.

What a TPU's compiler is told it is told by the environment, before jax starts; it
cannot be interrupted, and it may abort.  So a plan calls its own command line again,
with a variable that names the file for what is found.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from jaxpref.errors import InputError
from jaxpref.plan.chips import Topology

TARGET = "JAXPREF_PLAN_TARGET"
"""The variable."""
OF_CLUSTERS = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
    "JOB_COMPLETION_INDEX",
)
"""Variables by which a process would wait for others."""


def environment(topology: Topology, target: Path) -> dict[str, str]:
    """Of the process that compiles for a topology."""
    keep = {k: v for k, v in os.environ.items() if k not in OF_CLUSTERS}
    virtual = "--xla_force_host_platform_device_count"
    flags = re.sub(rf"{virtual}=\S*", "", keep.get("XLA_FLAGS", "")).split()
    if topology.chip is None:
        flags.append(f"{virtual}={topology.devices}")
    return keep | {
        TARGET: str(target),
        "XLA_FLAGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        # Nobody runs these programs; what is found of them is kept instead.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "MALLOC_ARENA_MAX": "8",  # a compiler gives its memory back
        # No machine is asked what it is, and no chip is opened, so others may have it.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def ask(argv: Sequence[str], topology: Topology, title: str) -> dict:
    """What `program.measure` finds, of a process that is shown while it works.

    Args:
      argv: of `jaxpref plan`.
      topology: the devices.
      title: shown.

    Raises:
      InputError: what the process says in its one line.
      RuntimeError: if it ends otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="jaxpref-plan-") as folder:
        target, log = Path(folder) / "found.json", Path(folder) / "log"
        with log.open("wb") as told:
            process = subprocess.Popen(
                [sys.executable, "-m", "jaxpref", "plan", *argv],
                env=environment(topology, target),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=told,
            )
            try:
                _wait(process, title)
            finally:
                process.kill()
                process.wait()
        if process.returncode == 0:
            return json.loads(target.read_text("utf-8"))
        lines = log.read_text("utf-8", "replace").strip().splitlines()
    start = "jaxpref: error: "
    for line in lines:
        if line.startswith(start):
            raise InputError(line.removeprefix(start))
    tail = "\n".join(lines[-20:])
    raise RuntimeError(f"the compiler ended with code {process.returncode}:\n{tail}")


def _wait(process: subprocess.Popen, title: str) -> None:
    terminal = sys.stderr.isatty()
    with tqdm(
        desc=title, bar_format="{desc}: {elapsed}", leave=False, disable=None
    ) as bar:
        told = 0
        while True:
            try:
                process.wait(1 if terminal else 60)
                return
            except subprocess.TimeoutExpired:
                bar.refresh()
                told += not terminal
                if told:
                    print(f"{title}: {told} min", file=sys.stderr, flush=True)
