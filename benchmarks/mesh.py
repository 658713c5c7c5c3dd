r"""The overhead of sharding a step over a mesh: eight virtual devices and one.

Times the training step (DPO, AdamW, one pair per row) on the same global batch of
random pairs.  It runs on one device and on eight virtual devices of the same cores,
sharded along each axis of the mesh and along all three.  The cores do the same useful
work, so the additional time is the overhead: collectives, replicated work, and smaller
matrix products.  Each layout runs in its own process, in turns; an overhead is the
ratio of medians in the same turn.

Commands
        python -m benchmarks.mesh --json mesh.json
        python -m benchmarks.mesh --quick

Expected
    Wall-clock time relative to the unsharded step, on two quiet cores with `--turns 3
    --steps 5` (median and range over turns; 5 minutes):

                                    260 thousand parameters    17 million
        data 8                      +4% (+2 to +16)           +29% (+21 to +36)
        fsdp 8                      +22% (+9 to +32)          +11% (+9 to +20)
        fsdp 4, tensor 2            +16% (+8 to +25)          +13% (+4 to +18)
        data 2, fsdp 2, tensor 2    +16% (+5 to +32)          +21% (+16 to +36)

    The unsharded step takes 0.153 and 1.28 s.  CPU time grows by 16 to 30% and
    14 to 36%.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import tyro
from tqdm import tqdm

from benchmarks.bvpo_overhead import MODELS as SMALL
from benchmarks.random_steps import make_step, padded_batch, random_pairs
from jaxpref.errors import InputError
from jaxpref.files import check_output, write_json
from jaxpref.models import build
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.mesh import to_global
from jaxpref.train import MeshConfig, make_mesh

DEVICES = 8
UNSHARDED = "unsharded"
MESHES = {
    UNSHARDED: MeshConfig(),
    "data 8": MeshConfig(data=8, fsdp=1),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "fsdp 4, tensor 2": MeshConfig(data=1, fsdp=4, tensor=2),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
}
MODELS = {
    "260 thousand parameters": SMALL["stories260k"],
    "17 million parameters": LlamaArchitecture(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
}
CLOCKS = {"clock": time.perf_counter, "processors": time.process_time}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshBenchmark:
    """Options of this benchmark."""

    pairs: int = 16
    """Pairs per step, over all devices."""
    prompt: int = 64
    """Tokens of every prompt."""
    completion: int = 64
    """Tokens of every completion."""
    steps: int = 10
    """Timed steps per turn, after two for compilation and warm-up."""
    turns: int = 3
    """Turns."""
    json: str | None = None
    """JSON file for the results."""
    quick: bool = False
    """One turn of three steps with the smaller model only."""


def measure(config: MeshBenchmark, model_name: str, mesh_name: str) -> dict:
    """Median wall-clock and CPU seconds of a step, in a separate process."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    virtual = "--xla_force_host_platform_device_count="
    flags = [flag for flag in flags if not flag.startswith(virtual)]
    if mesh_name != UNSHARDED:
        flags.append(f"{virtual}{DEVICES}")
    asked = json.dumps([dataclasses.asdict(config), model_name, mesh_name])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.mesh", "--only", asked],
        env=os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"{model_name}, {mesh_name}: {message}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def only(config: MeshBenchmark, model_name: str, mesh_name: str) -> None:
    """Prints JSON for `measure`."""
    model = build(MODELS[model_name])
    sizes = np.tile(
        [config.prompt, config.completion, config.completion], (config.pairs, 1)
    )
    pairs = random_pairs(sizes, vocab_size=model.architecture.vocab_size)
    mesh = make_mesh(MESHES[mesh_name])
    with jax.set_mesh(mesh):
        batch = to_global(padded_batch(pairs), mesh)
        step, new_state = make_step(model)
        state = jax.jit(lambda key: new_state(model.init(key)))(jax.random.key(0))
        seconds = {name: [] for name in CLOCKS}
        for number in range(config.steps + 2):
            began = {name: clock() for name, clock in CLOCKS.items()}
            state, metrics = step(state, {}, batch)
            jax.block_until_ready((state, metrics))
            for name, clock in CLOCKS.items() if number >= 2 else ():
                seconds[name].append(clock() - began[name])
    print(json.dumps({name: float(np.median(s)) for name, s in seconds.items()}))


def main(config: MeshBenchmark) -> list[dict]:
    """Measures all layouts in turns; returns a record per model and mesh."""
    if config.json is not None:
        check_output("--json", config.json, {})
    if config.quick:
        config = dataclasses.replace(config, steps=3, turns=1)
    models = list(MODELS)[: 1 if config.quick else None]
    works = [(model, mesh) for model in models for mesh in MESHES]
    seconds = {work: [] for work in works}
    for turn in range(config.turns):
        # There and back, so that none always follows the same one.
        order = works if turn % 2 == 0 else works[::-1]
        for work in tqdm(order, desc=f"turn {turn + 1} of {config.turns}"):
            seconds[work].append(measure(config, *work))
    records = []
    for model, mesh in works:
        record = {"model": model, "mesh": mesh}
        for clock in CLOCKS:
            own = np.array([found[clock] for found in seconds[model, mesh]])
            whole = np.array([found[clock] for found in seconds[model, UNSHARDED]])
            record[clock] = {
                "seconds": own.tolist(),
                "overhead": (own / whole - 1).tolist(),
            }
        records.append(record)
        print(describe(record), flush=True)
    if config.json is not None:
        setting = dataclasses.asdict(config)
        write_json(config.json, {"config": setting, "records": records})
    return records


def describe(record: dict) -> str:
    """One line."""
    lines = [f"{record['model']}, {record['mesh']}:"]
    for clock in CLOCKS:
        found = record[clock]
        lines.append(f"{1000 * np.median(found['seconds']):.0f} ms by the {clock}")
        if record["mesh"] != UNSHARDED:
            low, middle, high = np.quantile(found["overhead"], (0, 0.5, 1))
            lines[-1] += f" ({middle:+.0%}; {low:+.0%} to {high:+.0%})"
    return f"{lines[0]} {', '.join(lines[1:])}"


if __name__ == "__main__":
    with entry_point():
        if sys.argv[1:2] == ["--only"]:
            asked, *names = json.loads(sys.argv[2])
            only(MeshBenchmark(**asked), *names)
        else:
            main(tyro.cli(MeshBenchmark, description=__doc__))
