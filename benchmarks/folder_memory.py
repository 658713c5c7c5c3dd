"""Host memory while a model folder is read and written, beside the size of its weights.

    python -m benchmarks.folder_memory                        (1.2 billion weights)
    python -m benchmarks.folder_memory --model smollm2-135m

Writes a folder with random bfloat16 weights, reads it in a new process onto one and
onto eight virtual devices, and writes it again.  "Peak" is the largest amount of memory
that the process itself holds, without the files that the system caches.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import tyro

SHARD = 500_000_000
"""Bytes per file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the benchmark."""

    model: str = "llama-3-1b"
    """A preset of `jaxpref plan`."""


def held() -> float:
    """GiB that this process holds."""
    with open("/proc/self/status") as file:
        kib = next(int(x.split()[1]) for x in file if x.startswith("RssAnon"))
    return kib / 2**20


class Peak:
    """The largest amount of memory held between `start` and `stop`."""

    def start(self) -> "Peak":
        """Begins to watch."""
        self.most, self.watching = 0.0, True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while self.watching:
            self.most = max(self.most, held())
            time.sleep(0.005)

    def stop(self) -> float:
        """Ends; returns GiB."""
        self.watching = False
        self.thread.join()
        return self.most


def write(folder: Path, preset: str) -> None:
    """Writes a folder with random weights."""
    import jax
    import numpy as np

    from jaxpref.models import Numerics, build
    from jaxpref.models.folder import save
    from jaxpref.plan.presets import PRESETS

    numerics = Numerics(param_dtype="bfloat16", compute_dtype="bfloat16")
    model, rng = build(PRESETS[preset], numerics), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    draw = lambda x: rng.standard_normal(x.shape, np.float32).astype(x.dtype)
    save(folder, model, jax.tree.map(draw, shapes), max_file_bytes=SHARD)


def read(folder: Path, devices: int) -> None:
    """Reads a folder onto some devices, writes it again, and prints the memory."""
    import jax

    from jaxpref.models import Numerics, build
    from jaxpref.models.folder import load_params, save
    from jaxpref.models.folder_config import read_architecture
    from jaxpref.train import MeshConfig, make_mesh

    numerics = Numerics(param_dtype="bfloat16", compute_dtype="bfloat16")
    model = build(read_architecture(folder), numerics)
    with jax.set_mesh(make_mesh(MeshConfig())):
        before, peak = held(), Peak().start()
        params = jax.block_until_ready(load_params(folder, model))
        reading = peak.stop() - before
        weights = sum(x.nbytes for x in jax.tree.leaves(params)) / 2**30
        peak = Peak().start()
        save(folder.with_name("again"), model, params, max_file_bytes=SHARD)
        writing = peak.stop() - before
    print(
        f"{devices} devices: weights {weights:.2f} GiB, peak while reading "
        f"{reading:.2f} GiB, while writing {writing:.2f} GiB",
        flush=True,
    )


def main(options: Options) -> None:
    """Runs each part in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "model")
        for call in (f"write(p, {options.model!r})", "read(p, 1)", "read(p, 8)"):
            devices = 8 if call.endswith("8)") else 1
            flags = f"--xla_force_host_platform_device_count={devices}"
            code = (
                "from pathlib import Path; from benchmarks.folder_memory import *; "
                f"p = Path({target!r}); {call}"
            )
            environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            subprocess.run([sys.executable, "-c", code], env=environment, check=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
