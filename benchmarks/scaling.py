r"""How the step time scales with length, pairs, layers, vocabulary, and devices.

Times the training step (DPO, AdamW, packed rows) on random pairs, with one row per pair
and alternating sizes, and fits

    log seconds = exponent * log size + constant

by least squares to the medians over turns; the spread is that of fits to single turns.

The number of tokens grows with the length of the pairs and with their number.
Attention within a pair is the only part whose cost is quadratic in the length.  It is
timed separately: a program that runs only `packed_attention` on rows with the same
segments, for all layers, forward and backward, is timed in the same turn and
subtracted.

Commands
        python -m benchmarks.scaling --json scaling.json --png scaling.png
        python -m benchmarks.scaling --quick

Expected
    Exponents with `--clock processors` on two cores busy with other work, jax 0.10.2,
    float32 (spread over three turns; between the largest two sizes):

        tokens per pair, 256 to 4,096     1.16 (1.13 to 1.20; 1.52)
          attention alone                 1.80 (1.78 to 1.84; 1.90)
          without attention               0.94 (0.92 to 1.04; 1.11)
        pairs per step, 1 to 8            1.00 (0.98 to 1.00; 1.09)
        layers, 1 to 8                    0.75 (0.71 to 0.76; 0.91)
        vocabulary, 4,096 to 32,768       0.26 (0.23 to 0.31; 0.40)
        virtual devices, 1 to 4           0.11 (0.07 to 0.14; 0.12)

    Attention is 0.08 of a step with one pair of 256 tokens and 0.43 with one of 4,096.
    The run took 388 seconds of CPU time and 15 minutes of wall-clock time.

    The devices are virtual ones on the same cores, in a separate process for each
    number of devices.  This measures the overhead of sharding and cannot show a
    speedup.
"""

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure

from benchmarks.random_steps import make_step, pair_a_row_batch, random_pairs
from jaxpref.data.batch import PreferenceBatch
from jaxpref.errors import InputError
from jaxpref.files import check_output, write_json, write_whole
from jaxpref.models import Model, build
from jaxpref.models.attention import Segments, packed_attention
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.report.style import FAINT, MATPLOTLIB, PALETTE
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.mesh import to_global
from jaxpref.train import MeshConfig, make_mesh

Axis = Literal["length", "pairs", "layers", "vocabulary", "devices"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Options of this benchmark.  Along an axis, the other sizes are fixed."""

    axes: tuple[Axis, ...] | None = None
    """Axes to scale (default: all; length and pairs in a quick run)."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """Tokens per row: a seventh for the prompt, three sevenths for each answer."""
    counts: tuple[int, ...] = (1, 2, 4, 8)
    """Pairs per step."""
    depths: tuple[int, ...] = (1, 2, 4, 8)
    """Layers."""
    vocabularies: tuple[int, ...] = (4096, 8192, 16384, 32768)
    """Sizes of the vocabulary."""
    devices: tuple[int, ...] = (1, 2, 4)
    """Numbers of virtual devices, over which rows and weights are sharded (fsdp)."""
    length: int = 512
    """Value for the other axes."""
    pairs: int = 1
    """Value for the other axes; along `devices`, the largest number of devices."""
    layers: int = 4
    """Value for the other axes."""
    vocabulary: int = 8192
    """Value for the other axes."""
    hidden: int = 576
    """Width: three query heads of 64 for each key head, the MLP 8/3 as wide."""
    turns: int = 3
    """Timed turns; one more before them compiles."""
    clock: Literal["wall", "processors"] = "wall"
    """Wall-clock time, or CPU time over all cores, which is less sensitive to other
    load."""
    json: str | None = None
    """JSON file for the results."""
    png: str | None = None
    """File for the figure."""
    quick: bool = False
    """Two turns, without the largest two sizes of each axis."""

    def __post_init__(self):
        if self.hidden % 192 or min(self.length, *self.lengths) < 8 or self.turns < 1:
            raise InputError(
                f"hidden {self.hidden}, lengths {self.lengths}, turns {self.turns}: "
                "give a multiple of 192, at least 8 tokens, at least 1 turn"
            )
        for name in FIELDS.values():
            if len(getattr(self, name)) < 2:
                raise InputError(f"{name}: give at least two, an exponent needs them")


FIELDS = {
    "length": "lengths",
    "pairs": "counts",
    "layers": "depths",
    "vocabulary": "vocabularies",
    "devices": "devices",
}
"""The options that list the sizes along each axis."""


def axes_of(config: ScalingConfig) -> tuple[Axis, ...]:
    """The axes to scale; a quick run has fewer, since it spends most time compiling."""
    return config.axes or tuple(FIELDS)[: 2 if config.quick else None]


def sizes_of(config: ScalingConfig, axis: Axis) -> tuple[int, ...]:
    """Sizes along an axis in order, without the largest two in a quick run."""
    sizes = tuple(sorted(getattr(config, FIELDS[axis])))
    return sizes[: max(len(sizes) - 2, 2)] if config.quick else sizes


def turns_of(config: ScalingConfig) -> int:
    """The number of timed turns."""
    return min(config.turns, 2) if config.quick else config.turns


# ---- what is timed -----------------------------------------------------------------


def make_model_and_batch(config: ScalingConfig, changes: dict[str, int]):
    """A model and a batch of the default sizes, with `changes`."""
    at = {name: getattr(config, name) for name in FIELDS if name != "devices"}
    at |= changes
    model = build(
        LlamaArchitecture(
            vocab_size=at["vocabulary"],
            hidden_size=config.hidden,
            intermediate_size=config.hidden * 8 // 3,
            num_layers=at["layers"],
            num_heads=config.hidden // 64,
            num_kv_heads=config.hidden // 192,
            head_dim=64,
            max_position_embeddings=at["length"],
            tie_word_embeddings=True,
        )
    )
    answer = 3 * at["length"] // 7
    sizes = [at["length"] - 2 * answer, answer, answer]
    pairs = random_pairs(np.tile(sizes, (at["pairs"], 1)), vocab_size=at["vocabulary"])
    return model, pair_a_row_batch(pairs)


def whole_step(model: Model, batch: PreferenceBatch, mesh=None) -> Callable:
    """Runs a step."""
    batch = jax.device_put(batch) if mesh is None else to_global(batch, mesh)
    step, new_state = make_step(model)
    state = [jax.jit(lambda key: new_state(model.init(key)))(jax.random.key(0))]

    def run():
        state[0], metrics = step(state[0], {}, batch)
        jax.block_until_ready((state[0], metrics))

    return run


def attention_alone(model: Model, batch: PreferenceBatch) -> Callable:
    """Runs the attention of all layers of a step, forward and backward."""
    c, segments = model.architecture, jnp.asarray(batch.segments[0, :, 0])
    parts = segments // batch.num_parts, segments % batch.num_parts
    q, k, v, cotangents = (
        jax.random.normal(key, (c.num_layers, *segments.shape, heads, c.head_dim))
        for key, heads in zip(
            jax.random.split(jax.random.key(0), 4),
            (c.num_heads, c.num_kv_heads, c.num_kv_heads, c.num_heads),
        )
    )

    def total(q, k, v, cotangents):
        # Stacked and scanned, so that as much is stored for the backward pass.
        def layer(_, x):
            return None, packed_attention(*x, Segments(*parts))

        _, out = jax.lax.scan(layer, None, (q, k, v))
        return jnp.sum(out * cotangents)

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    return lambda: jax.block_until_ready(gradient(q, k, v, cotangents))


CLOCKS = {"wall": time.perf_counter, "processors": time.process_time}


def timed(run: Callable, clock: str) -> float:
    """Seconds of one call."""
    started = CLOCKS[clock]()
    run()
    return CLOCKS[clock]() - started


def measure(config: ScalingConfig, axis: Axis) -> list[dict]:
    """Seconds for every size, turn by turn."""
    sizes = sizes_of(config, axis)
    if axis == "devices":
        return [measure_devices(config, count) for count in sizes]
    works = {}
    for size in sizes:
        made = make_model_and_batch(config, {axis: size})
        works[size] = {"seconds": whole_step(*made)}
        if axis == "length":  # along the other axes, its share hardly changes
            works[size]["attention_seconds"] = attention_alone(*made)
    records = [
        {"axis": axis, "size": size} | {name: [] for name in works[size]}
        for size in sizes
    ]
    for turn in range(turns_of(config) + 1):
        # Forward, then backward, so that no size always follows the same one.
        for record in records if turn % 2 else records[::-1]:
            for name, run in works[record["size"]].items():
                seconds = timed(run, config.clock)
                if turn:
                    record[name].append(seconds)
    return records


def measure_devices(config: ScalingConfig, count: int) -> dict:
    """Times the same step on `count` virtual devices, in a separate process."""
    flags = f"--xla_force_host_platform_device_count={count}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    asked = json.dumps(dataclasses.asdict(config))
    command = [sys.executable, "-m", "benchmarks.scaling", "--only-devices", asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"{count} virtual devices: {line}")
    seconds = json.loads(done.stdout.strip().splitlines()[-1])
    return {"axis": "devices", "size": count, "seconds": seconds}


def only_devices(config: ScalingConfig) -> None:
    """Prints the seconds of each turn on all devices of this process."""
    pairs = max(sizes_of(config, "devices"))
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        run = whole_step(*make_model_and_batch(config, {"pairs": pairs}), mesh)
        seconds = [timed(run, config.clock) for _ in range(turns_of(config) + 1)]
        print(json.dumps(seconds[1:]))


# ---- what it says ------------------------------------------------------------------


def fit(sizes, seconds) -> dict[str, float]:
    """Exponents: of the medians, the range over turns, and of the largest two sizes.

    Args:
      sizes: [N].
      seconds: [N, turns].
    """
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(seconds, float))
    middle = np.median(y, axis=1)
    turns = np.polyfit(x, y, 1)[0]
    return {
        "exponent": float(np.polyfit(x, middle, 1)[0]),
        "low": float(turns.min()),
        "high": float(turns.max()),
        # The fixed cost of a step hides growth from the fit, least of all between the
        # largest two sizes.
        "last": float(np.diff(middle)[-1] / np.diff(x)[-1]),
    }


def curves_of(records: list[dict]) -> dict[str, np.ndarray]:
    """Seconds [N, turns] of the whole step and, if timed, of its parts."""
    whole = np.array([r["seconds"] for r in records])
    if "attention_seconds" not in records[0]:
        return {"step": whole}
    attention = np.array([r["attention_seconds"] for r in records])
    curves = {"step": whole, "attention alone": attention}
    if (whole > attention).all():
        curves["without attention"] = whole - attention
    return curves


def fits_of(records: list[dict]) -> dict[str, dict]:
    """Fits every curve along an axis."""
    sizes = [r["size"] for r in records]
    return {name: fit(sizes, rows) for name, rows in curves_of(records).items()}


TITLES = {
    "length": "tokens per pair",
    "pairs": "pairs per step",
    "layers": "layers",
    "vocabulary": "size of the vocabulary",
    "devices": "virtual devices, same cores",
}


def draw(path: str, records: list[dict], fits: dict[str, dict]) -> None:
    """One log-log panel per axis."""
    columns = min(len(fits), 3)
    rows = -(-len(fits) // columns)
    with matplotlib.rc_context(MATPLOTLIB):
        figure = Figure(
            figsize=(max(4.2, 3.3 * columns), 3 * rows + 0.3), layout="constrained"
        )
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for (axis, found), panel in zip(fits.items(), panels):
            draw_panel(panel, [r for r in records if r["axis"] == axis], found)
            panel.set_title(TITLES[axis])
        for panel in panels:
            panel.set_visible(False)
        image = io.BytesIO()
        figure.savefig(image, format="png")
    write_whole(path, image.getvalue())


def draw_panel(panel, records: list[dict], fits: dict[str, dict]) -> None:
    """Medians over turns and their range; a dotted line for proportional growth."""
    sizes = np.array([r["size"] for r in records], float)
    curves = curves_of(records)
    for color, (name, seconds) in zip(PALETTE, curves.items()):
        label = f"{name}: exponent {fits[name]['exponent']:.2f}"
        middle = np.median(seconds, axis=1)
        panel.plot(sizes, middle, color=color, marker="o", ms=4, label=label)
        low, high = seconds.min(1), seconds.max(1)
        panel.fill_between(sizes, low, high, color=color, alpha=0.15, lw=0)
    lowest = min(rows.min() for rows in curves.values())
    highest = max(rows.max() for rows in curves.values())
    if records[0]["axis"] != "devices":
        line = np.median(curves["step"][-1]) * sizes / sizes[-1]
        panel.plot(sizes, line, color=FAINT, ls=":", lw=1, label="in proportion")
        lowest = min(lowest, line[0])
    panel.set(xscale="log", yscale="log", ylabel="seconds per step")
    # At least a factor of four, with space for the legend above.
    low = lowest / 1.3
    panel.set_ylim(low, max(highest, 4 * low) * (highest / low) ** (0.15 * len(curves)))
    panel.set_xticks(sizes, [f"{size:g}" for size in sizes])
    subs = (1, 2, 5) if highest < 40 * lowest else (1, 3)
    panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
    panel.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    panel.minorticks_off()
    panel.legend(fontsize=8, loc="upper left")


def main(config: ScalingConfig) -> None:
    """Measures axis by axis."""
    if config.json is not None:
        check_output("--json", config.json, {})
    records, fits = [], {}
    for axis in axes_of(config):
        found = measure(config, axis)
        records += found
        fits[axis] = fits_of(found)
        for r in found:
            text = f"{axis} {r['size']}: {np.median(r['seconds']):.3f} s"
            if "attention_seconds" in r:
                text += f", attention alone {np.median(r['attention_seconds']):.3f} s"
            print(text, flush=True)
        for name, of in fits[axis].items():
            print(
                f"{axis}, {name}: exponent {of['exponent']:.3f} ({of['low']:.3f} to "
                f"{of['high']:.3f}), between the largest two {of['last']:.3f}",
                flush=True,
            )
    if config.json is not None:
        setting = dataclasses.asdict(config)
        write_json(config.json, {"config": setting, "records": records, "fits": fits})
    if config.png is not None:
        draw(config.png, records, fits)


if __name__ == "__main__":
    with entry_point():
        if sys.argv[1:2] == ["--only-devices"]:
            only_devices(ScalingConfig(**json.loads(sys.argv[2])))
        else:
            main(tyro.cli(ScalingConfig, description=__doc__))
