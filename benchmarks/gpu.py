r"""A DPO step of a 1B-class model on one GPU: bf16 products, float32 master weights.

Commands
    Random weights and random pairs of up to 2,048 tokens in packed rows of 2,048, and
    TRL on the same pairs, with a Python interpreter that has torch and trl:

        python -m benchmarks.gpu --json gpu.json
        python -m benchmarks.gpu --trl-python ~/trl/bin/python --json gpu.json

    A model folder or hub id, and its own data:

        python -m benchmarks.gpu --model unsloth/Llama-3.2-1B --data pairs.jsonl

    The same code on a CPU with tiny sizes, as a sanity check with meaningless numbers:

        python -m benchmarks.gpu --platform cpu --tiny

Expected
    Without a GPU, one line and exit code 0.  It has not run on a GPU yet.

Results
    Useful FLOP count each prompt once, real tokens only, the head on completion tokens
    only, and attention within the mask.  The backward pass counts twice the forward
    pass; padding and recomputation count nothing.  MFU is useful FLOP per second
    divided by the peak of the card, with the same useful FLOP for TRL.  Peak memory is
    that of the allocator over the whole run, without the CUDA context.
"""

import os

# JAX would reserve 75% of the card, and leave little for TRL's process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import dataclasses
import functools
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.peers.records import useful_flops
from benchmarks.random_steps import make_step, random_pairs, reference_of
from jaxpref import data
from jaxpref.errors import InputError
from jaxpref.files import check_output, write_json
from jaxpref.models import Numerics, build
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import architecture_to_fields, read_architecture
from jaxpref.models.hub import resolve_folder
from jaxpref.plan.presets import PRESETS
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.mesh import row_shards, to_global
from jaxpref.scoring import make_scorer
from jaxpref.train import MeshConfig, make_mesh

PEAK_TFLOPS = {
    # Dense bf16 with float32 sums, at boost clock, from NVIDIA's data sheets, most of
    # which give twice the rate, "with sparsity".  H200 and H100: SXM; A100: both kinds.
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "H100 PCIe": 756,
    "A100": 312,
    "L40S": 362,
    "A10": 125,
    "L4": 121,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Options of this benchmark."""

    platform: Literal["gpu", "cpu"] = "gpu"
    """Platform to use; `cpu` is a dry run."""
    tiny: bool = False
    """A model of 0.1M parameters and short pairs."""
    model: str | None = None
    """Model folder or hub id; random weights of a 1B-class Llama if not given."""
    data: str | None = None
    """Preference file, with --model; random pairs if not given."""
    row_length: int = 2048
    """Tokens per packed row, and maximum tokens of a pair."""
    batch_size: int = 16
    """Pairs per step, on average."""
    logit_chunk: int | None = None
    """Completion tokens of a row whose logits are in memory at once; by default as in
    training, as many as fill a quarter of a GiB."""
    remat: Literal["none", "dots", "full"] = "dots"
    """What the backward pass recomputes; TRL: everything with full, else nothing.
    """
    blocks: int = 5
    """Timed blocks of steps."""
    steps: int = 4
    """Steps per block; two untimed blocks come first."""
    peak_tflops: float | None = None
    """The card's dense bf16 rate, if the table does not have it."""
    trl_python: str | None = None
    """Python interpreter with torch and trl, to measure TRL in the same run."""
    trl_accumulation: int = 1
    """Micro-batches of TRL's step."""
    json: str | None = None
    """JSON file for the results."""

    def __post_init__(self):
        if (self.model is None) != (self.data is None):
            raise InputError("--model and --data come together, or neither")
        chunk = 1 if self.logit_chunk is None else self.logit_chunk
        if min(self.batch_size, self.blocks, self.steps, chunk) < 1:
            raise InputError("batch_size, blocks, steps, logit_chunk: give at least 1")
        if self.batch_size % self.trl_accumulation:
            raise InputError(
                f"trl_accumulation {self.trl_accumulation}: must divide batch_size "
                f"{self.batch_size}"
            )


# ---- the card ----------------------------------------------------------------------


def find_device(platform: str) -> jax.Device | None:
    """The first device of a platform, or None."""
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        return jax.devices(platform)[0]
    except (RuntimeError, AssertionError):
        # The latter if JAX_PLATFORMS names a plugin that is not installed.
        return None


def peak_of(kind: str, given: float | None) -> float:
    """TFLOP/s of a card by its name ("NVIDIA H200"), from the longest matching entry.

    The slower NVL cards and parts of a card (MIG) have no entry.
    """
    named = [
        name
        for name in PEAK_TFLOPS
        if re.search(rf"\b{re.escape(name)}\b(?!.* (NVL|MIG)\b)", kind) is not None
    ]
    if given is not None:
        return given
    if not named:
        raise InputError(f"{kind}: unknown peak rate; pass --peak-tflops, dense bf16")
    return float(PEAK_TFLOPS[max(named, key=len)])


def product_tflops(size: int, repeats: int = 5) -> float:
    """Median rate of large bf16 matrix products in this run."""
    a = jnp.ones((size, size), jnp.bfloat16)
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(a, a).block_until_ready()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        multiply(a, a).block_until_ready()
        found.append(2 * size**3 / (time.perf_counter() - started) / 1e12)
    return float(np.median(found))


# ---- the work ----------------------------------------------------------------------


def make_pairs(
    config: GpuConfig,
) -> tuple[LlamaArchitecture, data.PreferenceDataset, Path | None]:
    """The model's sizes, the pairs, and the model's folder if given."""
    if config.model is None:
        sizes = PRESETS["llama-3-1b"]
        if config.tiny:
            sizes = dataclasses.replace(
                sizes,
                vocab_size=512,
                hidden_size=64,
                intermediate_size=128,
                num_layers=2,
                num_heads=4,
                num_kv_heads=2,
                head_dim=16,
            )
        # At most a quarter of a row for the prompt and 3/8 for each answer.
        most = config.row_length // np.array([4, 1, 1]) * [1, 3, 3] // [1, 8, 8]
        count = config.batch_size * config.steps * (config.blocks + 2)
        rng = np.random.default_rng(0)
        lengths = rng.integers(np.maximum(most // 8, 1), most + 1, (count, 3))
        return sizes, random_pairs(lengths, vocab_size=sizes.vocab_size), None
    folder = Path(resolve_folder(config.model))
    options = data.DataOptions(max_length=config.row_length // 2, heldout_fraction=0.0)
    tokenizer = data.load_tokenizer(folder)
    plan = data.make_splits(data.open_source(config.data), tokenizer, options)
    return read_architecture(folder), plan.train, folder


def quantiles(values) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def measure(
    config: GpuConfig,
    sizes: LlamaArchitecture,
    pairs: data.PreferenceDataset,
    folder: Path | None,
) -> dict:
    """Our step on packed rows, including making and placing batches."""
    numerics = Numerics(compute_dtype="bfloat16", remat=config.remat)
    model = build(sizes, numerics)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        order = data.uniform(pairs, 0)
        layout = data.packed_layout(
            pairs,
            order=order,
            row_length=config.row_length,
            batch_size=config.batch_size,
            shards=row_shards(mesh),
        )
        batches = layout.batches(pairs, order, reference=reference_of(pairs))
        scorer = make_scorer(
            model, frozenset({"policy_logps"}), chunk_size=config.logit_chunk
        )
        step, new_state = make_step(model, scorer)
        key = jax.random.key(0)
        if folder is None:
            params = jax.jit(model.init)(key)
        else:
            params = load_params(folder, model)
        state = jax.jit(new_state, donate_argnums=0)(params)
        del params
        flops = useful_flops(sizes, pairs.prompt_lengths, pairs.completion_lengths)
        rates = {"pairs_per_second": [], "tokens_per_second": [], "tflops": []}
        filled = []
        for number in range(config.blocks + 2):
            seen = []
            started = time.perf_counter()
            for _ in range(config.steps):
                batch = next(batches)
                seen.append(batch)
                state, metrics = step(state, {}, to_global(batch, mesh))
            loss = float(metrics["loss"])  # waits for the last step
            seconds = time.perf_counter() - started
            if number < 2:
                continue
            index = np.concatenate([b.pair_index[b.pair_index >= 0] for b in seen])
            tokens = sum(b.lengths.sum() for b in seen)
            filled.append(tokens / sum(b.tokens.size for b in seen))
            rates["pairs_per_second"].append(len(index) / seconds)
            rates["tokens_per_second"].append(tokens / seconds)
            rates["tflops"].append(flops[index].sum() / seconds / 1e12)
    if not np.isfinite(loss):
        raise InputError(f"the loss is {loss} after {config.blocks + 2} blocks")
    stats = jax.devices()[0].memory_stats() or {}  # a CPU has none
    peak = stats.get("peak_bytes_in_use")
    return {
        "system": "jaxpref",
        "rows": layout.rows * layout.accumulation,
        "filled": float(np.mean(filled)),
        "peak_mib": None if peak is None else peak / 2**20,
    } | {name: quantiles(found) for name, found in rates.items()}


def measure_trl(config: GpuConfig, sizes: LlamaArchitecture, pairs, folder) -> dict:
    """TRL's trainer on the same pairs in its own process, with a stored reference."""
    count = min(len(pairs), config.batch_size * config.steps * (config.blocks + 2))
    job = {
        "device": config.platform,
        "folder": None if folder is None else str(folder),
        "config": architecture_to_fields(sizes),
        "batch_size": config.batch_size,
        "accumulation": config.trl_accumulation,
        "remat": config.remat == "full",
        "steps": config.steps * (config.blocks + 2),
        "pairs": [
            [pairs.prompt(n).tolist()]
            + [pairs.completion(n, side).tolist() for side in (0, 1)]
            for n in range(count)
        ],
    }
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "job.json"
        path.write_text(json.dumps(job))
        script = Path(__file__).with_name("gpu_trl.py")
        done = subprocess.run(
            [config.trl_python, str(script), str(path)], capture_output=True, text=True
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        message = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"system": "trl", "error": message[:300]}
    found = json.loads(lines[-1])
    # The same order in both: TRL's loader does not shuffle here.
    seconds = np.array(found.pop("seconds")).reshape(-1, config.steps)[2:].sum(1)
    flops = useful_flops(sizes, pairs.prompt_lengths, pairs.completion_lengths)
    held = config.batch_size * config.steps
    blocks = (np.arange((2 + n) * held, (3 + n) * held) for n in range(config.blocks))
    work = np.array([flops[index % count].sum() for index in blocks])
    return {
        "system": "trl",
        **found,
        "pairs_per_second": quantiles(held / seconds),
        "tflops": quantiles(work / seconds / 1e12),
    }


def line(found: dict, peak: float | None) -> str:
    """Formats the results of one system."""
    if "error" in found:
        return f"{found['system']}: no figure ({found['error']})"
    spread = lambda x, scale=1.0: (
        f"{x['median'] * scale:.3g} ({x['low'] * scale:.3g} to {x['high'] * scale:.3g})"
    )
    parts = [f"{spread(found['pairs_per_second'])} pairs/s"]
    if "tokens_per_second" in found:
        parts.append(f"{spread(found['tokens_per_second'])} tokens/s")
    parts.append(f"{spread(found['tflops'])} useful TFLOP/s")
    if peak is not None:
        parts.append(f"MFU {spread(found['tflops'], 100 / peak)}%")
    if found["peak_mib"] is not None:
        parts.append(f"peak {found['peak_mib'] / 1024:.1f} GiB")
    if "filled" in found:
        parts.append(f"rows {found['filled']:.0%} full")
    return f"{found['system']}: " + ", ".join(parts)


def main(config: GpuConfig) -> None:
    """Measures and prints the results; one line only if there is no GPU."""
    if config.json is not None:
        check_output(
            "--json", config.json, {"--model": config.model, "--data": config.data}
        )
    device = find_device(config.platform)
    if device is None:
        print("no GPU found by jax: skipped (--platform cpu is a dry run)")
        return
    peak, kind = None, device.device_kind
    if config.platform == "cpu":
        print("dry run on a CPU: a sanity check that says nothing about GPUs")
    else:
        peak = peak_of(kind, config.peak_tflops)
    sizes, pairs, folder = make_pairs(config)
    systems = [functools.partial(measure, config)]
    if config.trl_python is not None:
        # First, while this process uses no memory of the card.
        systems.insert(0, functools.partial(measure_trl, config))
    found = []
    for run in systems:
        try:
            found.append(run(sizes, pairs, folder))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise InputError(
                f"out of memory on {kind} with {config.batch_size} pairs in rows of "
                f"{config.row_length} tokens, remat {config.remat}: give a smaller "
                "--batch-size, or --remat full"
            ) from error
        print(line(found[-1], peak), flush=True)
    product = product_tflops(256 if config.tiny else 8192)
    print(f"{kind}: {product:.3g} TFLOP/s in bf16 products, peak {peak or 'unknown'}")
    if config.json is not None:
        record = {
            "dry_run": config.platform == "cpu",
            "device": kind,
            "jax": jax.__version__,
            "peak_tflops": peak,
            "product_tflops": product,
            "config": dataclasses.asdict(config),
            "systems": found,
        }
        write_json(config.json, record)


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(GpuConfig, description=__doc__))
