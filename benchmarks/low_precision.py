r"""What bfloat16 parameters cost: rounded to nearest, with master weights, randomly.

    python -m benchmarks.inputs hh stories260k
    python -m benchmarks.low_precision --model inputs/stories260k-hf \
        --data inputs/hh_rlhf_helpful_base_test.jsonl.gz --steps 60 --rates 1e-6 1e-4 \
        --max-length 64 --batch-size 8 --max-pairs 200

Trains the same pairs in the same order with AdamW and five ways to store its numbers,
at several learning rates:

    float32          parameters and both moments in float32
    nearest          all in bfloat16, every result rounded to the nearest
    master           bfloat16 parameters, rounded from float32 copies in the optimizer's
                     state, which has float32 moments
    stochastic       all in bfloat16, rounded stochastically (`jaxpref.rounding`); this
                     is what --param-dtype bfloat16 does
    stochastic mixed the same with float32 moments

Prints a table: bytes of parameters and optimizer state per weight, the share of weights
that moved, and the loss on held-out pairs after the last step.  Further columns
are the difference of this loss from that of float32 with the same seed (mean and
standard deviation over seeds), and the distance of the weights from those of float32,
relative to how far those have moved.  docs/training.md has the results.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jaxpref import losses
from jaxpref.data import DataOptions
from jaxpref.objectives import from_loss
from jaxpref.rounding import rounded_stochastically
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.mesh import to_global
from jaxpref.train import OptimizerConfig, TrainConfig, prepare
from jaxpref.train.evaluation import evaluation_metrics
from jaxpref.train.optimizer import make_schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this benchmark."""

    model: str
    """Model folder or Hub ID."""
    data: str
    """Preference file."""
    steps: int = 200
    """Optimizer steps."""
    seeds: int = 3
    """Number of orders of the pairs."""
    rates: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3)
    """Peak learning rates."""
    batch_size: int = 16
    """Pairs per step."""
    max_length: int = 128
    """Maximum length of prompt plus completion, in tokens."""
    max_pairs: int = 1000
    """Maximum number of pairs to read."""


class Way(NamedTuple):
    """A way to store the numbers of AdamW."""

    param_dtype: str
    wrap: Callable[..., optax.GradientTransformation]


class Run(NamedTuple):
    """What a run ended with."""

    loss: float
    first: np.ndarray
    last: np.ndarray
    bytes_per_weight: float


def main(options: Options) -> None:
    """Trains all ways, and prints the table."""
    ways = {
        "float32": Way("float32", lambda tx, seed: tx),
        "nearest": Way("bfloat16", lambda tx, seed: tx),
        "master": Way("bfloat16", lambda tx, seed: with_master(tx)),
        "stochastic": Way("bfloat16", rounded_stochastically),
        "stochastic mixed": Way("bfloat16", with_wide_moments),
    }
    print(
        f"{'rate':>8} {'way':16} {'bytes':>5} {'moved':>7} {'loss':>7} "
        f"{'difference':>19} {'distance':>8}"
    )
    for rate in options.rates:
        baseline: list[Run] = []
        for name, way in ways.items():
            runs = [train(options, way, rate, seed) for seed in range(options.seeds)]
            baseline = baseline or runs
            _print(rate, name, runs, baseline)


def train(options: Options, way: Way, rate: float, seed: int) -> Run:
    """One run."""
    config = TrainConfig(
        model=options.model,
        data=options.data,
        out="unused",
        objective=from_loss(losses.dpo),
        options=DataOptions(
            max_length=options.max_length,
            max_pairs=options.max_pairs,
            heldout_fraction=0.2,
        ),
        optimizer=OptimizerConfig(learning_rate=rate),
        max_steps=options.steps,
        batch_size=options.batch_size,
        row_length="none",
        param_dtype=way.param_dtype,
        seed=seed,
    )
    task = prepare(config)
    # One seed of the rounding, so that all orders share a compiled program.
    tx = way.wrap(adamw(config.optimizer, options.steps), seed=0)
    task = dataclasses.replace(task, optimizer=tx)
    splits = task.datasets.splits
    with jax.set_mesh(task.mesh):
        params = task.scorer.load(task.model_folder, jax.random.key(seed))
        score = task.score(task.score_step)
        reference = {
            name: {"reference_logps": _logps(score(params, {}, pairs, title=name))}
            for name, pairs in (("train", splits.train), ("heldout", splits.heldout))
        }
        first = _flat(params)
        state = jax.jit(task.new_state)(params)
        stored = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
        batches = task.batches(reference=reference["train"])
        for _ in range(options.steps):
            batch = to_global(next(batches), task.mesh)
            state, _ = task.train_step(state, {}, batch)
        scores = score(state.params, {}, splits.heldout, title="heldout")
        found = evaluation_metrics(
            task.evaluation,
            scores,
            reference["heldout"],
            splits.heldout,
            state.objective_state,
        )
    return Run(found["eval_loss"], first, _flat(state.params), stored / first.size)


def adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW as in training, without decay or any special handling of bfloat16."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )


def with_master(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps float32 copies of the parameters in the optimizer's state."""

    def init(params):
        master = wide(params)
        return master, tx.init(master)

    def update(grads, state, params):
        master, inner = state
        updates, inner = tx.update(wide(grads), inner, master)
        master = optax.apply_updates(master, updates)
        near = wide(jax.tree.map(lambda m, p: m.astype(p.dtype), master, params))
        return jax.tree.map(jnp.subtract, near, wide(params)), (master, inner)

    return optax.GradientTransformation(init, update)


def with_wide_moments(
    tx: optax.GradientTransformation, *, seed: int
) -> optax.GradientTransformation:
    """Rounds parameters stochastically, with float32 moments."""
    rounded = rounded_stochastically(tx, seed=seed)

    def init(params):
        state = rounded.init(params)
        return state._replace(inner=tx.init(wide(params)))

    return optax.GradientTransformation(init, rounded.update)


wide = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))


def _logps(scores: dict[str, np.ndarray]) -> np.ndarray:
    (logps,) = scores.values()
    return logps


def _flat(params: Any) -> np.ndarray:
    leaves = [np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(params)]
    return np.concatenate(leaves)


def _print(rate: float, name: str, runs: list[Run], baseline: list[Run]) -> None:
    losses = np.array([run.loss for run in runs])
    more = losses - np.array([run.loss for run in baseline])
    moved = np.mean([np.mean(run.last != run.first) for run in runs])
    # Relative to the path of float32; the bfloat16 runs start at rounded weights.
    apart = [
        np.linalg.norm((run.last - run.first) - (base.last - base.first))
        / np.linalg.norm(base.last - base.first)
        for run, base in zip(runs, baseline, strict=True)
    ]
    spread = more.std(ddof=1) if len(more) > 1 else math.nan
    print(
        f"{rate:8.0e} {name:16} {runs[0].bytes_per_weight:5.1f} {moved:7.1%} "
        f"{losses.mean():7.4f} {more.mean():+9.5f} ± {spread:7.5f} "
        f"{np.mean(apart):8.3f}",
        flush=True,
    )


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
