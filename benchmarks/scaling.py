r"""How a train step's time grows with length, batch, layers, vocabulary and devices.

Times the step that training runs (DPO, AdamW) on random pairs, one size after the
other in turn, and fits  log seconds = exponent * log size + constant  by least squares
to every turn; its spread is that over the turns.

Attention is the one part whose cost grows with the square of the length.  Its share is
timed apart: a program of the same shapes that runs only attention, all the layers,
forward and backward (`jaxpref.models.transformer.attention`), is timed within the same
turn and its seconds are taken off the step's.

Commands
        python -m benchmarks.scaling --json scaling.json --png scaling.png
        python -m benchmarks.scaling --axes length --quick

Expected
    An exponent of at most 1.05 in the length without attention; on a busy machine take
    `--clock processors`, since a difference of two disturbed times says little.

    Devices are virtual ones on the same cores, each number in a process of its own: it
    shows that the program runs on them and what dividing the work costs, and can show
    no speed-up.
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

from benchmarks.random_steps import make_step, padded_batch, random_pairs
from jaxpref.errors import InputError
from jaxpref.files import write_json, write_whole
from jaxpref.models import ModelConfig, build
from jaxpref.models.transformer import attention
from jaxpref.report.style import FAINT, MATPLOTLIB, PALETTE
from jaxpref.train import MeshConfig, make_mesh
from jaxpref.train.entry import entry_point
from jaxpref.train.mesh import to_global

Axis = Literal["length", "batch", "layers", "vocabulary", "devices"]
Work = tuple[Callable, Callable | None]
"""Runs a step; runs its attention alone, or None."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """What is timed.  Along an axis all other sizes are the single ones."""

    axes: tuple[Axis, ...] = ("length", "batch", "layers", "vocabulary", "devices")
    """What grows."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """Tokens of a sequence, a quarter of them its prompt."""
    batches: tuple[int, ...] = (1, 2, 4, 8)
    """Pairs of a step."""
    depths: tuple[int, ...] = (1, 2, 4, 8)
    """Layers."""
    vocabularies: tuple[int, ...] = (4096, 8192, 16384, 32768)
    """Sizes of the vocabulary."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Virtual devices, over which the rows and weights are spread (fsdp)."""
    length: int = 256
    """On the other axes."""
    batch: int = 1
    """On the other axes, but eight with several devices."""
    layers: int = 2
    """On the other axes."""
    vocabulary: int = 8192
    """On the other axes."""
    hidden: int = 512
    """Width; heads have 128 features, the MLP three times the width."""
    turns: int = 5
    """Turns; one before them compiles."""
    clock: Literal["wall", "processors"] = "wall"
    """Seconds by the clock, or of all processors together, which other work on the
    machine disturbs less."""
    json: str | None = None
    """File for the records."""
    png: str | None = None
    """File for the figure."""
    quick: bool = False
    """Two turns, the largest two sizes of each axis left out."""

    def __post_init__(self):
        if self.hidden % 128 or min(self.length, *self.lengths) < 8 or self.turns < 1:
            raise InputError(
                f"hidden {self.hidden}, lengths {self.lengths}, turns {self.turns}: "
                "give a multiple of 128, at least 8 tokens, at least 1 turn"
            )
        for name in ("lengths", "batches", "depths", "vocabularies", "devices"):
            if len(getattr(self, name)) < 2:
                raise InputError(f"{name}: give at least two, an exponent needs them")


FIELDS = {
    "length": "lengths",
    "batch": "batches",
    "layers": "depths",
    "vocabulary": "vocabularies",
    "devices": "devices",
}
"""The options that list the sizes along each axis."""


def sizes_of(config: ScalingConfig, axis: Axis) -> tuple[int, ...]:
    """In order, without the largest two in a quick run."""
    sizes = tuple(sorted(getattr(config, FIELDS[axis])))
    return sizes[: max(len(sizes) - 2, 2)] if config.quick else sizes


# ---- what is timed -----------------------------------------------------------------


def make_work(config: ScalingConfig, changes: dict[str, int], mesh=None) -> Work:
    """The step and its attention, for the single sizes and `changes` of them."""
    at = {name: getattr(config, name) for name in FIELDS if name != "devices"}
    at |= changes
    model = build(
        ModelConfig(
            vocab_size=at["vocabulary"],
            hidden_size=config.hidden,
            intermediate_size=3 * config.hidden,
            num_layers=at["layers"],
            num_heads=config.hidden // 128,
            num_kv_heads=config.hidden // 128,
            head_dim=128,
            max_position_embeddings=at["length"],
        )
    )
    quarter = at["length"] // 4
    lengths = [quarter, at["length"] - quarter, at["length"] - quarter]
    pairs = random_pairs(
        np.tile(lengths, (at["batch"], 1)), vocab_size=at["vocabulary"]
    )
    batch = padded_batch(pairs)
    batch = jax.device_put(batch) if mesh is None else to_global(batch, mesh)
    step, new_state = make_step(model)
    state = [jax.jit(lambda key: new_state(model.init(key)))(jax.random.key(0))]

    def run():
        state[0], metrics = step(state[0], batch)
        jax.block_until_ready((state[0], metrics))

    return run, attention_alone(model.config, 2 * at["batch"], at["length"])


def attention_alone(config: ModelConfig, rows: int, length: int) -> Callable:
    """Runs the attention of all layers of a step, forward and backward."""
    shape = (config.num_layers, rows, length, config.num_heads, config.head_dim)
    q, k, v = jax.random.normal(jax.random.key(0), (3, *shape))

    def total(q, k, v):
        # Stacked and scanned, so that as much is kept for the backward pass.
        _, out = jax.lax.scan(lambda _, x: (None, attention(*x, None)), None, (q, k, v))
        return jnp.sum(out)

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    return lambda: jax.block_until_ready(gradient(q, k, v))


CLOCKS = {"wall": time.perf_counter, "processors": time.process_time}


def timed(run: Callable, clock: str) -> float:
    """Seconds of one call."""
    started = CLOCKS[clock]()
    run()
    return CLOCKS[clock]() - started


def measure(config: ScalingConfig, axis: Axis) -> list[dict]:
    """Seconds of every size, turn by turn."""
    sizes = sizes_of(config, axis)
    if axis == "devices":
        return [measure_devices(config, count) for count in sizes]
    works = {size: make_work(config, {axis: size}) for size in sizes}
    found = {size: [] for size in sizes}
    turns = 2 if config.quick else config.turns
    for turn in range(turns + 1):
        # There and back, so that no size always follows the same one.
        for size in sizes if turn % 2 else sizes[::-1]:
            seconds = [timed(run, config.clock) for run in works[size]]
            if turn:
                found[size].append(seconds)
    return [
        {
            "axis": axis,
            "size": size,
            "seconds": [whole for whole, _ in rows],
            "attention_seconds": [part for _, part in rows],
        }
        for size, rows in found.items()
    ]


def measure_devices(config: ScalingConfig, count: int) -> dict:
    """The same step of eight pairs on so many virtual devices, in its own process."""
    flags = f"--xla_force_host_platform_device_count={count}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    asked = json.dumps(dataclasses.asdict(config))
    command = [sys.executable, "-m", "benchmarks.scaling", "--only-devices", asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        told = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"{count} virtual devices: {told}")
    seconds = json.loads(done.stdout.strip().splitlines()[-1])
    return {"axis": "devices", "size": count, "seconds": seconds}


def only_devices(config: ScalingConfig) -> None:
    """Prints the seconds of the turns on all devices of this process."""
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        run, _ = make_work(config, {"batch": 8}, mesh)
        turns = 2 if config.quick else config.turns
        print(json.dumps([timed(run, config.clock) for _ in range(turns + 1)][1:]))


# ---- what it says ------------------------------------------------------------------


def fit(sizes, seconds) -> dict[str, float]:
    """Exponents of each turn: median, least and most; and the steepest piece.

    Args:
      sizes: [N].
      seconds: [N, turns].
    """
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(seconds, float))
    slopes = np.polyfit(x, y, 1)[0]
    pieces = np.diff(np.median(y, axis=1)) / np.diff(x)
    return {
        "exponent": float(np.median(slopes)),
        "low": float(slopes.min()),
        "high": float(slopes.max()),
        "steepest": float(pieces.max()),
    }


def fits_of(records: list[dict]) -> dict[str, dict]:
    """Of the whole step, and without attention where that was timed."""
    sizes = [r["size"] for r in records]
    whole = np.array([r["seconds"] for r in records])
    found = {"step": fit(sizes, whole)}
    if "attention_seconds" in records[0]:
        rest = whole - np.array([r["attention_seconds"] for r in records])
        if (rest > 0).all():
            found["without attention"] = fit(sizes, rest)
    return found


def draw(path: str, records: list[dict], fits: dict[str, dict]) -> None:
    """A panel an axis, both scales logarithmic."""
    axes_found = list(fits)
    columns = min(len(axes_found), 3)
    rows = -(-len(axes_found) // columns)
    with matplotlib.rc_context(MATPLOTLIB):
        figure = Figure(
            figsize=(max(4.2, 3.1 * columns), 2.9 * rows + 0.5), layout="constrained"
        )
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axis, panel in zip(axes_found, panels):
            found = [r for r in records if r["axis"] == axis]
            sizes = np.array([r["size"] for r in found], float)
            whole = np.array([r["seconds"] for r in found])
            curves = {"step": whole}
            if "without attention" in fits[axis]:
                curves["without attention"] = whole - np.array(
                    [r["attention_seconds"] for r in found]
                )
            for color, (name, seconds) in zip(PALETTE, curves.items()):
                exponent = fits[axis][name]["exponent"]
                middle = np.median(seconds, axis=1)
                panel.plot(
                    sizes, middle, color=color, marker="o", ms=4,
                    label=f"{name}: {exponent:.2f}",
                )  # fmt: skip
                panel.fill_between(
                    sizes, seconds.min(1), seconds.max(1), color=color, alpha=0.15, lw=0
                )
            if axis != "devices":
                first = np.median(curves[name], axis=1)[0]
                panel.plot(
                    sizes, first * sizes / sizes[0], color=FAINT, ls=":", lw=1,
                    label="in proportion",
                )  # fmt: skip
            panel.set(xscale="log", yscale="log", title=axis, ylabel="seconds a step")
            panel.set_xticks(sizes, [f"{size:g}" for size in sizes])
            panel.minorticks_off()
            panel.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            panel.legend(fontsize=8)
        for panel in panels:
            panel.set_visible(False)
        image = io.BytesIO()
        figure.savefig(image, format="png")
    write_whole(path, image.getvalue())


def main(config: ScalingConfig) -> None:
    """Axis by axis."""
    records, fits = [], {}
    for axis in config.axes:
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
                f"{of['high']:.3f}), steepest piece {of['steepest']:.3f}",
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
