r"""The overhead of estimating alpha in a training step.

Times blocks of `probe_every` steps with alpha "auto", one of which includes a probe,
alternating with equal blocks with alpha 0.5, on random tokens.

Commands
    The overhead, and the cost of one probe relative to a step:

        python -m benchmarks.bvpo_overhead
        python -m benchmarks.bvpo_overhead --probe-every 1 --blocks 41
        python -m benchmarks.bvpo_overhead --model smollm-135m-2-layers \
            --batch-size 4 --probe-every 1 --blocks 7

    Steps with few tokens, for which the random signs cost most:

        python -m benchmarks.bvpo_overhead --model smollm-135m-2-layers \
            --batch-size 2 --prompt 32 --completion 32 --blocks 5

Expected
    The overhead in wall-clock time and in CPU time, which is less sensitive to other
    load: median and quartiles over pairs of blocks.  In wall-clock time on two
    quiet cores 6.3% (-0.9 to 7.1) for the first and 119.6% (112.6 to 124.9, five
    blocks) for the third, a sixteenth of which is 7.5%.
"""

import dataclasses
import functools
import time
from typing import Literal

import jax
import numpy as np
import tyro

from jaxpref import data, losses
from jaxpref.models import Numerics, build
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.objectives import bvpo, from_loss
from jaxpref.plan.presets import PRESETS
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.mesh import to_global
from jaxpref.scoring import make_scorer
from jaxpref.train import MeshConfig, OptimizerConfig, make_mesh
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.state import init_state
from jaxpref.train.step import make_train_step

MODELS = {
    "stories260k": LlamaArchitecture(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_layers=5,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
    "smollm-135m-2-layers": dataclasses.replace(PRESETS["smollm2-135m"], num_layers=2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverheadConfig:
    """Options of this benchmark."""

    model: Literal["stories260k", "smollm-135m-2-layers"] = "stories260k"
    """Preset of sizes; the weights are random."""
    batch_size: int = 8
    """Pairs per step, half of them with an empty trace."""
    prompt: int = 64
    """Tokens of every prompt."""
    completion: int = 64
    """Tokens of every completion."""
    probe_every: int = 16
    """Steps per block, one of which has a probe."""
    blocks: int = 9
    """Pairs of blocks."""


def make_pairs(config: OverheadConfig, vocab_size: int) -> data.PreferenceDataset:
    """Random pairs of equal lengths, every other one with an empty trace."""
    rng = np.random.default_rng(0)
    tokens = lambda count: rng.integers(3, vocab_size, count).tolist()
    builder = data.DatasetBuilder(2)
    for n in range(64):
        completions = [tokens(config.completion) for _ in range(2)]
        builder.add(
            tokens(config.prompt),
            completions,
            id=str(n),
            columns={"empty_trace": n % 2 == 1},
        )
    return builder.build()


def measure(config: OverheadConfig) -> np.ndarray:
    """Seconds of every block, [2, 2, blocks]: wall-clock and CPU time, with
    "auto" and with 0.5."""
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        model = build(MODELS[config.model], Numerics(twice_differentiable=True))
        optimizer = OptimizerConfig()
        schedule = make_schedule(optimizer, 1000)
        tx = make_optimizer(optimizer, schedule)
        pairs = make_pairs(config, model.architecture.vocab_size)
        reference = {"reference_logps": np.zeros((len(pairs), 2), np.float32)}
        layout = data.padded_layout(pairs, batch_size=config.batch_size)
        batches = layout.batches(
            pairs,
            data.mixture(pairs, 0),
            reference=reference,
        )
        batch = to_global(next(batches), mesh)
        runs = []
        for alpha in ("auto", 0.5):
            objective = bvpo(
                from_loss(losses.dpo), alpha=alpha, probe_every=config.probe_every
            )
            scorer = make_scorer(model, objective.scores)
            step = make_train_step(scorer, objective, tx, schedule)
            new = jax.jit(functools.partial(init_state, tx=tx, objective=objective))
            runs.append([step, new(jax.jit(model.init)(jax.random.key(0)))])

        def block(run) -> np.ndarray:
            start = np.array([time.perf_counter(), time.process_time()])
            for _ in range(config.probe_every):
                run[1], _ = run[0](run[1], None, batch)
            jax.block_until_ready(run[1])
            return np.array([time.perf_counter(), time.process_time()]) - start

        # The first blocks compile, and "auto" probes every one of their steps.
        for run in runs:
            block(run)
        seconds = []
        for n in range(config.blocks):
            # In turn, so that neither always follows the other.
            order = (0, 1) if n % 2 == 0 else (1, 0)
            found = {k: block(runs[k]) for k in order}
            seconds.append([found[0], found[1]])
        return np.moveaxis(np.array(seconds), 0, -1).swapaxes(0, 1)


def main() -> None:
    """Measures and prints the overhead."""
    with entry_point():
        config = tyro.cli(OverheadConfig, description=__doc__)
        for name, (auto, fixed) in zip(("clock", "processors"), measure(config)):
            low, median, high = np.percentile(100 * (auto / fixed - 1), (25, 50, 75))
            step = 1000 * np.median(fixed) / config.probe_every
            print(
                f"{config.model}, {name}: {step:.0f} ms per step, {median:+.1f}% with "
                f"auto (quartiles {low:+.1f} to {high:+.1f}, {config.blocks} pairs)"
            )


if __name__ == "__main__":
    main()
