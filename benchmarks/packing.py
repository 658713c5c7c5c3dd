r"""What packing saves: one padded pair per row, or several that share their prompts.

    python -m benchmarks.inputs hh stories260k
    python -m benchmarks.packing --model inputs/stories260k-hf --row-length 1024 \
        --data inputs/hh_rlhf_helpful_base_test.jsonl.gz --steps 8

Trains both layouts for a few steps on the same pairs, taking turns.  For each it prints
the padding overhead (computed tokens per real token, with each prompt counted once) and
the pairs per second: median and quartiles over steps, without the first two.

Expected: a padding overhead of 2.56 and about 1.05.
"""

import dataclasses
import time
from pathlib import Path

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
    """Preference file."""
    row_length: int = 1024
    """Tokens of a packed row."""
    max_length: int = 512
    """Maximum length of prompt plus completion, in tokens."""
    batch_size: int = 32
    """Pairs per step."""
    max_pairs: int = 800
    """Maximum number of pairs to read."""
    steps: int = 12
    """Steps per layout."""


def main(options: Options) -> None:
    """Trains both layouts, in turns."""
    folder = Path(resolve_folder(options.model))
    plan = data.make_splits(
        data.open_source(options.data),
        data.load_tokenizer(folder),
        data.DataOptions(max_length=options.max_length, max_pairs=options.max_pairs),
    )
    pairs, model = plan.train, build(read_architecture(folder))
    reference = {"reference_logps": np.zeros((len(pairs), 2), np.float32)}
    size, order = options.batch_size, data.uniform(pairs, 0)
    layouts = {
        "one pair per row": data.padded_layout(pairs, batch_size=size),
        "packed rows": data.packed_layout(
            pairs, order=order, row_length=options.row_length, batch_size=size
        ),
    }
    layouts = {
        name: layout.batches(pairs, order, reference=reference)
        for name, layout in layouts.items()
    }
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        tx = make_optimizer(OptimizerConfig(), make_schedule(OptimizerConfig(), 1000))
        objective = from_loss(losses.dpo)
        step = make_train_step(
            make_scorer(model, objective.scores),
            objective,
            tx,
            make_schedule(OptimizerConfig(), 1000),
        )
        states = {
            name: jax.jit(lambda p: init_state(p, tx, objective))(
                load_params(folder, model)
            )
            for name in layouts
        }
        found = {name: [] for name in layouts}
        for number in range(options.steps + 2):
            for name, batches in layouts.items():
                batch = next(batches)
                real = batch.pair_index[batch.pair_index >= 0]
                exist = pairs.packed_lengths[real].sum()
                placed = to_global(batch, mesh)
                started = time.perf_counter()
                states[name], metrics = step(states[name], {}, placed)
                jax.block_until_ready(metrics)
                seconds = time.perf_counter() - started
                if number >= 2:
                    rate = len(real) / seconds
                    found[name].append((rate, batch.tokens.size / exist))
    for name, rows in found.items():
        rates, waste = np.array(rows).T
        low, middle, high = np.quantile(rates, [0.25, 0.5, 0.75])
        print(
            f"{name}: {middle:.1f} pairs per second ({low:.1f} to {high:.1f}); "
            f"padding overhead {np.mean(waste):.2f}"
        )


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
