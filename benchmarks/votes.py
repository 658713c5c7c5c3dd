r"""How long is an epoch if the votes on a pair share one forward pass?

    python -m benchmarks.inputs ukp stories260k
    python -m benchmarks.votes --model inputs/stories260k-hf \
        --data inputs/ukpconvarg1_votes.jsonl.gz

Trains DPO with `--objective em` for some steps in two ways, in turns: with one row for
all votes on a pair, as `jaxpref train` does, and with a row for each vote.  Both see as
many votes per step on average.  Prints the tokens and the seconds of an epoch, from the
tokens of all records and the median CPU time per token of a step.
"""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
import tyro

from jaxpref import data, losses
from jaxpref.data.votes import share_votes
from jaxpref.models import build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import resolve_folder
from jaxpref.objectives import em
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.mesh import to_global
from jaxpref.scoring import make_scorer
from jaxpref.train import MeshConfig, OptimizerConfig, make_mesh
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.state import init_state
from jaxpref.train.step import make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this benchmark."""

    model: str
    """Model folder or hub id."""
    data: str
    """Preference file whose records have votes."""
    row_length: int = 1024
    """Tokens of a packed row."""
    max_length: int = 512
    """Maximum length of prompt plus completion, in tokens."""
    max_pairs: int = 2000
    """Maximum number of votes to read."""
    batch_size: int = 8
    """Pairs per step; with a row for each vote, as many votes as these have."""
    rounds: int = 5
    """Steps of each kind, in turns."""


def main(options: Options) -> None:
    """Measures steps of both kinds in turns."""
    folder = Path(resolve_folder(options.model))
    rows = data.make_splits(
        data.open_records(options.data, data.RecordOptions(), sides=2),
        data.load_tokenizer(folder),
        data.DataOptions(max_length=options.max_length, max_pairs=options.max_pairs),
    ).train
    (shared,) = share_votes(rows)
    votes = len(rows) / len(shared)
    print(f"{len(rows):,} votes on {len(shared):,} pairs, {votes:.1f} each", flush=True)
    kinds = {
        "shared": (shared, options.batch_size),
        "a row for each vote": (rows, round(options.batch_size * votes)),
    }
    model, config = build(read_architecture(folder)), OptimizerConfig()
    schedule, objective = make_schedule(config, 1000), em(losses.dpo)
    tx, mesh = make_optimizer(config, schedule), make_mesh(MeshConfig())
    annotators = len(rows.annotator_names)
    new = lambda p: init_state(p, tx, objective, num_annotators=annotators)
    with jax.set_mesh(mesh):
        scorer = make_scorer(model, objective.scores)
        step = make_train_step(scorer, objective, tx, schedule)
        states = {x: jax.jit(new)(load_params(folder, model)) for x in kinds}
        batches = {x: stream(*kinds[x], options.row_length) for x in kinds}
        found: dict[str, list[tuple[float, float]]] = {x: [] for x in kinds}
        for number in range(options.rounds + 1):
            for name in kinds:
                placed = to_global(next(batches[name]), mesh)
                began = time.process_time(), time.perf_counter()
                states[name], metrics = step(states[name], None, placed)
                jax.block_until_ready((states[name], metrics))
                spent = time.process_time() - began[0], time.perf_counter() - began[1]
                if number:  # not the first step, which compiles
                    tokens = float(metrics["tokens"])
                    found[name].append((spent[0] / tokens, spent[1] / tokens))
    epochs = {}
    for name, (pairs, _) in kinds.items():
        tokens = int(pairs.packed_lengths.sum())
        cpu, wall = tokens * np.median(found[name], axis=0)
        epochs[name] = cpu
        print(
            f"{name}: {tokens:,} tokens per epoch, {cpu:.1f} CPU seconds"
            f" ({wall:.1f} seconds)"
        )
    print(f"ratio {epochs['a row for each vote'] / epochs['shared']:.2f}")


def stream(pairs: data.PreferenceDataset, batch_size: int, row_length: int):
    """Endless packed batches, with reference scores of 0."""
    order = data.uniform(pairs, 0)
    layout = data.packed_layout(
        pairs, order=order, row_length=row_length, batch_size=batch_size
    )
    zeros = {"reference_logps": np.zeros((len(pairs), 2), np.float32)}
    return layout.batches(pairs, order, reference=zeros, threads=0)


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
