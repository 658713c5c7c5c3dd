"""The child process that compiles.

The TPU compiler is configured by environment variables that are read before jax starts.
It cannot be interrupted, and it may abort.  So `jaxpref plan` runs itself in a child
process, with an environment variable that names the file for the results.
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

from jaxpref.errors import InputError, show, visible
from jaxpref.plan.chips import Topology

TARGET = "JAXPREF_PLAN_TARGET"
"""Environment variable with the path of the result file."""
CLUSTER_VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
    "JOB_COMPLETION_INDEX",
)
"""Environment variables that would make the child wait for other processes."""


def environment(topology: Topology, target: Path) -> dict[str, str]:
    """The environment of the child process that compiles for a topology."""
    inherited = {k: v for k, v in os.environ.items() if k not in CLUSTER_VARIABLES}
    virtual = "--xla_force_host_platform_device_count"
    flags = re.sub(rf"{virtual}=\S*", "", inherited.get("XLA_FLAGS", "")).split()
    if topology.chip is None:
        flags.append(f"{virtual}={topology.devices}")
    return inherited | {
        TARGET: str(target),
        "XLA_FLAGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        # The programs are never run; the results are cached instead.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "MALLOC_ARENA_MAX": "8",  # keeps glibc's defaults (`runtime.malloc`)
        # Query no metadata server, and leave the chips of this machine to others.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def compile_in_child(argv: Sequence[str], topology: Topology, title: str) -> dict:
    """Runs `program.measure` in a child process and returns its result.

    Args:
      argv: arguments of `jaxpref plan`.
      topology: the target devices.
      title: text of the progress bar.

    Raises:
      InputError: with the child's message, if it reports invalid input.
      RuntimeError: if the child fails in any other way.
    """
    with tempfile.TemporaryDirectory(prefix="jaxpref-plan-") as folder:
        target, log = Path(folder) / "results.json", Path(folder) / "log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "jaxpref", "plan", *argv],
                env=environment(topology, target),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
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
        desc=visible(title), bar_format="{desc}: {elapsed}", leave=False, disable=None
    ) as bar:
        minutes = 0
        while True:
            try:
                process.wait(1 if terminal else 60)
                return
            except subprocess.TimeoutExpired:
                bar.refresh()
                minutes += not terminal
                if minutes:
                    show(f"{title}: {minutes} min", file=sys.stderr)
