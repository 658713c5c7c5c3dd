"""A process of `benchmarks.step`: jaxpref with packed rows and a stored reference."""

import functools
import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from job import RATE_SIZE, Job, Steps, read_job, read_pairs, write_rate, write_steps

from jaxpref import data, losses
from jaxpref.models import build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from jaxpref.objectives import from_loss
from jaxpref.runtime.malloc import reuse_freed_memory
from jaxpref.runtime.mesh import to_global
from jaxpref.scoring import make_scorer
from jaxpref.scoring.score_dataset import make_score_step, score_dataset
from jaxpref.train import Decay, MeshConfig, OptimizerConfig, make_mesh
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.state import init_state
from jaxpref.train.step import make_train_step


def layout(job: Job, pairs: data.PreferenceDataset):
    """Endless training batches and one pass of scoring batches, from pairs."""
    if job.row_length < 0:
        made = data.padded_layout(pairs, batch_size=job.batch_size)
        return _train(made, pairs), made.eval_batches
    longest = int((pairs.offsets[1:] - pairs.offsets[:-1]).max())
    # Half of the batch's tokens, but at least the longest pair.
    row = max(longest, job.batch_size * int(pairs.packed_lengths.mean()) // 2)
    made = data.packed_layout(
        pairs,
        order=data.uniform(pairs, 0),
        row_length=job.row_length or -(-row // 64) * 64,
        batch_size=job.batch_size,
    )
    return _train(made, pairs), made.eval_batches


def _train(made: data.Layout, pairs: data.PreferenceDataset):
    # Like a training run, it makes batches ahead of the step.
    return functools.partial(made.batches, pairs, data.uniform(pairs, 0))


def train(job: Job, out: Path) -> None:
    """Warms up on the first of the timed batches."""
    listed = read_pairs(job)
    first = 0 if job.repeat else job.warmup * job.batch_size
    listed = listed[: job.batch_size] if job.repeat else listed[first:]
    builder = data.DatasetBuilder(2)
    for number, (prompt, *answers) in enumerate(listed):
        builder.add(prompt, answers, id=str(number))
    pairs = builder.build()
    mesh, model = make_mesh(MeshConfig()), build(read_architecture(job.model))
    optimizer = OptimizerConfig(
        learning_rate=job.learning_rate,
        decay=Decay.CONSTANT,
        max_grad_norm=job.max_grad_norm,
    )
    schedule = make_schedule(optimizer, 1000)
    tx = make_optimizer(optimizer, schedule)
    objective, steps = from_loss(losses.dpo, beta=job.beta), Steps()
    with jax.set_mesh(mesh):
        train_batches, every = layout(job, pairs)
        scorer = make_scorer(model, objective.scores)
        params = load_params(job.model, model)
        policy = score_dataset(
            make_score_step(scorer),
            params,
            None,
            pairs,
            eval_batches=every,
            mesh=mesh,
            title="reference",
        )
        reference = {"reference_logps": policy["policy_logps"]}
        step = make_train_step(scorer, objective, tx, schedule)
        state = jax.jit(lambda p: init_state(p, tx, objective), donate_argnums=0)(
            params
        )
        del params
        fresh = functools.partial(train_batches, reference=reference)
        if job.repeat:
            (batch,) = every(pairs, reference=reference)
            batches = itertools.repeat(batch)
        else:
            first_batch = itertools.repeat(next(fresh()), job.warmup)
            batches = itertools.chain(first_batch, fresh())
        steps.ends.append(time.perf_counter())
        seen = done = 0
        # About as many pairs as in the other systems; packed batches vary.
        while done < job.warmup or seen < job.steps * job.batch_size:
            batch = next(batches)
            state, metrics = step(state, {}, to_global(batch, mesh))
            jax.block_until_ready((state, metrics))
            steps.ends.append(time.perf_counter())
            steps.losses.append(float(metrics["loss"]))
            steps.grad_norms.append(float(metrics["grad_norm"]))
            if done >= job.warmup:
                here = np.unique(batch.pair_index[batch.pair_index >= 0])
                steps.pairs.append((here + first).tolist())
                seen += len(here)
            done += 1
    write_steps(out, job, steps, ["jax", "flax"])


def rate(out: Path) -> None:
    """Times XLA's product of two matrices."""
    x = jnp.ones((RATE_SIZE, RATE_SIZE), jnp.float32)
    product = jax.jit(jnp.matmul)
    write_rate(out, lambda: jax.block_until_ready(product(x, x)))


if __name__ == "__main__":
    reuse_freed_memory()  # as jaxpref's commands do
    job, out = read_job()
    rate(out) if job.mode == "rate" else train(job, out)
