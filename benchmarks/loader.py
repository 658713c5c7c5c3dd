"""Does the step ever wait for data?  Batches a second, beside the time of a step.

    python -m benchmarks.loader --model stories260k-hf --data hh_rlhf_helpful_base_test.jsonl.gz

Makes batches of both layouts as fast as they come, by threads of this process and by
processes of their own, in turns, and compares the time of a batch with that of a train
step of the model on such a batch.  Then trains for real, and reports the share of time
that the run says it waited.  `--tokenizer` names another folder for the tokens, with
which there is no step and no run: the model has no such embeddings.

With `--processes 1 --max-length 256 --row-length 512 --max-pairs 400`, on two cores
busy with other work (medians of 5 rounds, quartiles): threads 972 (934 to 992) padded
and 1,108 (1,007 to 1,133) packed batches a second, one process 506 (486 to 508) and 406
(366 to 587), which carrying batches over costs; a step takes 1.1 and 1.3 seconds, a
thousand times a batch; the runs waited 0.03 % and 0.71 % of their time.
"""  # noqa: E501

import dataclasses
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tyro

from jaxpref import data, losses
from jaxpref.models import build
from jaxpref.models.hub import resolve_folder
from jaxpref.models.huggingface import load_config, load_params
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.mesh import to_global
from jaxpref.scoring.scores import make_scores
from jaxpref.train import (
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    from_loss,
    make_mesh,
    read_metrics,
    run,
)
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.state import init_state
from jaxpref.train.step import make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    model: str
    """Model folder or hub id."""
    data: str
    """Preference file."""
    tokenizer: str | None = None
    """Folder of another tokenizer: batches only, without a step."""
    row_length: int = 1024
    """Tokens of a packed row."""
    max_length: int = 512
    """Most tokens of prompt and completion together."""
    batch_size: int = 8
    """Pairs of a step."""
    max_pairs: int = 1000
    """Pairs that are read."""
    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes beside the thread."""
    batches: int = 40
    """Batches a round, of each."""
    rounds: int = 5
    """Times that all are measured, in turns."""
    steps: int = 10
    """Steps of the run of each layout; 0: no step is measured and nothing is run."""


def main(options: Options) -> None:
    """Batches, a step, and a run, of either layout."""
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

    for layout, row_length in (("padded", None), ("packed", options.row_length)):
        for processes, seconds in loading(make, layout, options).items():
            name = f"{processes} processes" if processes else "threads"
            low, middle, high = np.quantile(1 / seconds, [0.25, 0.5, 0.75])
            print(
                f"{layout}, {name}: {middle:.0f} batches a second ({low:.0f} to "
                f"{high:.0f}), {1e3 / middle:.2f} ms each",
                flush=True,
            )
        if options.tokenizer is None and options.steps:
            seconds = stepping(folder, next(make(layout, 0)), options.rounds)
            waited = running(options, chosen, row_length)
            print(
                f"{layout}: a step takes {1e3 * seconds:.0f} ms; a run of "
                f"{options.steps} steps waited {waited:.2%} of its time",
                flush=True,
            )


def loading(make, layout: str, options: Options) -> dict[int, np.ndarray]:
    """Seconds a batch in each round, by the number of processes; 0 is the thread."""
    iterators = {n: make(layout, n) for n in (0, *options.processes)}
    found = {n: [] for n in iterators}
    for number in range(options.rounds + 1):
        for n, batches in iterators.items():
            began = time.perf_counter()
            for _ in range(options.batches):
                next(batches)
            if number:  # not the one that starts threads and processes
                found[n].append((time.perf_counter() - began) / options.batches)
    for batches in iterators.values():
        batches.close()
    return {n: np.array(seconds) for n, seconds in found.items()}


def stepping(folder: Path, batch, rounds: int) -> float:
    """Median seconds of a DPO step on one batch."""
    model, config = build(load_config(folder)), OptimizerConfig()
    schedule = make_schedule(config, 1000)
    tx, objective = make_optimizer(config, schedule), from_loss(losses.dpo)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        step = make_train_step(make_scores(model), objective, tx, schedule)
        new = jax.jit(lambda params: init_state(params, tx, objective))
        state, placed = new(load_params(folder, model)), to_global(batch, mesh)
        seconds = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            state, metrics = step(state, placed)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))


def running(
    options: Options, chosen: data.DataOptions, row_length: int | None
) -> float:
    """The share of its time that a run waited, as it says itself."""
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
                # One line of all steps but the first, which compiles.
                log_every=options.steps,
            )
        )
        lines = read_metrics(out / "metrics.jsonl")
    return next(line["waiting"] for line in lines if "waiting" in line)


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
