r"""Does the step wait for data?  Batches per second, compared with the step time.

    python -m benchmarks.inputs hh stories260k
    python -m benchmarks.loader --model inputs/stories260k-hf \
        --data inputs/hh_rlhf_helpful_base_test.jsonl.gz

Makes batches of both layouts as fast as possible, first with threads of this process
and then with separate processes.  Compares the time of a batch with that of a train
step on it.  Then trains, and reports the share of time that the run waited for data.
`--tokenizer` names another folder for the tokenizer; then there is no step and no
training, because the model lacks the embeddings.

With `--processes 1 --max-length 256 --row-length 512 --max-pairs 400`, on two cores
busy with other work (medians and quartiles of 5 rounds): threads make 972 (934 to 992)
padded and 1,108 (1,007 to 1,133) packed batches per second, and one process 506 (486 to
508) and 406 (366 to 587), because of the transfer between processes.  A step takes 1.1
and 1.3 seconds, a thousand times as long as a batch.  The runs waited 0.03% and 0.71%
of their time.
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from jaxpref import data, losses
from jaxpref.models import build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import resolve_folder
from jaxpref.objectives import from_loss
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.mesh import to_global
from jaxpref.scoring import make_scorer
from jaxpref.train import (
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    make_mesh,
    read_metrics,
    run,
)
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.state import init_state
from jaxpref.train.step import make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this benchmark."""

    model: str
    """Model folder or hub id."""
    data: str
    """Preference file."""
    tokenizer: str | None = None
    """Folder of another tokenizer: measures batches only, without a step."""
    row_length: int = 1024
    """Tokens of a packed row."""
    max_length: int = 512
    """Maximum length of prompt plus completion, in tokens."""
    batch_size: int = 8
    """Pairs per step."""
    max_pairs: int = 1000
    """Maximum number of pairs to read."""
    processes: tuple[int, ...] = (1, 2)
    """Numbers of loader processes to compare with the thread."""
    batches: int = 40
    """Batches per round of each kind."""
    rounds: int = 5
    """Rounds of measurements, in turns."""
    steps: int = 10
    """Training steps per layout; 0 measures neither a step nor a run."""


def main(options: Options) -> None:
    """Measures batches, a step, and a run for both layouts."""
    folder = Path(resolve_folder(options.model))
    chosen = data.DataOptions(
        max_length=options.max_length, max_pairs=options.max_pairs
    )
    pairs = data.make_splits(
        data.open_source(options.data),
        data.load_tokenizer(Path(options.tokenizer or folder)),
        chosen,
    ).train
    reference = {"reference_logps": np.zeros((len(pairs), 2), np.float32)}
    size, order = options.batch_size, data.uniform(pairs, 0)
    layouts = {
        "padded": data.padded_layout(pairs, batch_size=size),
        "packed": data.packed_layout(
            pairs, order=order, row_length=options.row_length, batch_size=size
        ),
    }

    def make(layout: str, processes: int):
        return layouts[layout].batches(
            pairs, order, reference=reference, processes=processes
        )

    for layout, row_length in (("padded", "none"), ("packed", options.row_length)):
        for processes, seconds in loading(make, layout, options).items():
            name = f"{processes} processes" if processes else "threads"
            low, middle, high = np.quantile(1 / seconds, [0.25, 0.5, 0.75])
            print(
                f"{layout}, {name}: {middle:.0f} batches per second ({low:.0f} to "
                f"{high:.0f}), {1e3 / middle:.2f} ms each",
                flush=True,
            )
        if options.tokenizer is None and options.steps:
            seconds = stepping(folder, next(make(layout, 0)), options.rounds)
            waited = running(options, chosen, row_length)
            print(
                f"{layout}: a step takes {1e3 * seconds:.0f} ms; a run of "
                f"{options.steps} steps waited for data {waited:.2%} of the time",
                flush=True,
            )


def loading(make, layout: str, options: Options) -> dict[int, np.ndarray]:
    """Seconds per batch in each round, by the number of processes; 0 is the thread."""
    iterators = {n: make(layout, n) for n in (0, *options.processes)}
    found = {n: [] for n in iterators}
    for number in range(options.rounds + 1):
        for n, batches in iterators.items():
            began = time.perf_counter()
            for _ in range(options.batches):
                next(batches)
            if number:  # not the first batch, which starts threads and processes
                found[n].append((time.perf_counter() - began) / options.batches)
    for batches in iterators.values():
        batches.close()
    return {n: np.array(seconds) for n, seconds in found.items()}


def stepping(folder: Path, batch, rounds: int) -> float:
    """Median seconds of a DPO step on one batch."""
    model, config = build(read_architecture(folder)), OptimizerConfig()
    schedule = make_schedule(config, 1000)
    tx, objective = make_optimizer(config, schedule), from_loss(losses.dpo)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        step = make_train_step(
            make_scorer(model, objective.scores), objective, tx, schedule
        )
        new = jax.jit(lambda params: init_state(params, tx, objective))
        state, placed = new(load_params(folder, model)), to_global(batch, mesh)
        seconds = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            state, metrics = step(state, {}, placed)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))


def running(
    options: Options, chosen: data.DataOptions, row_length: int | Literal["none"]
) -> float:
    """The share of time that a run reports as waiting for data."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run(
            TrainConfig(
                model=options.model,
                data=options.data,
                out=str(out),
                objective=from_loss(losses.dpo),
                options=dataclasses.replace(chosen, max_pairs=10 * options.batch_size),
                batch_size=options.batch_size,
                row_length=row_length,
                max_steps=options.steps,
                # One line for all steps except the first, which compiles.
                log_every=options.steps,
            )
        )
        lines = read_metrics(out / "metrics.jsonl")
    return next(
        line["data_wait_fraction"] for line in lines if "data_wait_fraction" in line
    )


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
