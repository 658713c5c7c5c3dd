"""Objectives: from a loss to a gradient.

An objective is a pair `(init, gradient)` that the train step calls without knowing
which one it is:

    gradient(pair_logps, params, batch, state) -> (gradients, state, metrics)

`from_loss` makes one from any per-pair loss of `jaxpref.losses`.  The mathematics of
noise and of gradient mixing lives in their rooms; here it meets a model and a batch.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref import losses
from jaxpref.data.batch import PreferenceBatch
from jaxpref.errors import InputError
from jaxpref.models import Model, token_logps
from jaxpref.models.config import SPECS, on_mesh
from jaxpref.sharding import replicated

PairLogps = Callable[[Any, PreferenceBatch], jax.Array]
"""`(params, batch without its A axis) -> float32 [R, S, K]` completion log-probs."""


def make_pair_logps(model: Model, *, chunk_size: int = 64) -> PairLogps:
    """Completion log-probs of the rows of a batch under a model.

    The backbone runs on every token, the LM head on completion tokens only,
    `chunk_size` of them at a time.

    Args:
      model: the functional model.
      chunk_size: completion tokens of a sequence whose logits exist at the same time.

    Returns:
      A pure function from parameters and `[R, ...]` batch fields to `[R, S, K]` sums of
      token log-probs.
    """

    def pair_logps(params, batch: PreferenceBatch):
        rows, sequences, _ = batch.tokens.shape
        _, slots, sides = batch.completion_lengths.shape
        flat = lambda x: x.reshape(rows * sequences, *x.shape[2:])
        hidden = model.hidden(params, flat(batch.tokens))
        logps = token_logps(
            hidden,
            model.head(params),
            flat(batch.predictors),
            flat(batch.targets),
            chunk_size=chunk_size,
        )
        logps = jnp.reshape(
            logps, batch.targets.shape, out_sharding=on_mesh(SPECS.hidden)
        )
        sums = losses.sum_by_completion(
            logps, batch.completions, num_completions=slots * sides
        )
        return jnp.reshape(
            sums, (rows, slots, sides), out_sharding=on_mesh(SPECS.hidden)
        )

    return pair_logps


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a run makes small, and how its gradient is found."""

    name: str
    """The loss's name, for `config.json` and messages."""
    options: Mapping[str, Any]
    """The loss's hyper-parameters, defaults filled in."""
    reads: tuple[str, ...]
    """Names of the arrays the loss takes, in its order; see `pair_arrays`."""
    init: Callable[[], Any]
    """`init() -> state`."""
    gradient: Callable[..., tuple[Any, Any, dict[str, jax.Array]]]
    """`gradient(pair_logps, params, batch, state) -> (gradients, state, metrics)`."""
    losses: Callable[[jax.Array, PreferenceBatch, Any], jax.Array]
    """`losses(logps, batch, state) -> [..., S]`; one a pair, 0 in empty slots."""
    count: Callable[[PreferenceBatch], jax.Array]
    """`count(batch)`: what a sum of losses is divided by, over the global batch."""

    @property
    def sides(self) -> int:
        """K: 2 for losses of pairs, 1 where only the chosen completion is read."""
        return 2 if any("rejected" in name for name in self.reads) else 1

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads log-probs under a reference model."""
        return any("reference" in name for name in self.reads)


def from_loss(loss: Callable[..., jax.Array], **options) -> Objective:
    """The objective "mean of `loss` over the pairs of the global batch".

    Micro-batches add their sums and the total is divided by the number of pairs of the
    whole batch, so the result does not depend on accumulation, processes or mesh.

    Args:
      loss: a per-pair loss; its positional parameter names say which arrays it reads.
      **options: its hyper-parameters.

    Raises:
      InputError: if an option is unknown to the loss, missing, or out of its range.
    """
    return _accumulated(loss, options, lambda batch: jnp.sum(batch.pairs >= 0))


def sft() -> Objective:
    """Supervised fine-tuning: mean negative log-likelihood of the completion tokens."""
    tokens = lambda batch: jnp.sum(batch.completion_lengths[..., 0])
    return _accumulated(losses.sft, {}, tokens)


def pair_arrays(logps: jax.Array, batch: PreferenceBatch) -> dict[str, jax.Array]:
    """The arrays a loss may ask for by name, each `[..., S]`.

    Empty slots hold log-probs 0 and lengths 1, so that no loss divides by zero there.
    """
    arrays = {}
    for k, side in enumerate(("chosen", "rejected")[: logps.shape[-1]]):
        lengths = jnp.maximum(batch.completion_lengths[..., k], 1)
        arrays[f"policy_{side}_logps"] = logps[..., k]
        arrays[f"reference_{side}_logps"] = batch.reference_logps[..., k]
        arrays[f"{side}_lengths"] = lengths.astype(logps.dtype)
    return arrays


def _accumulated(loss, options, count) -> Objective:
    parameters = inspect.signature(loss).parameters.values()
    reads = tuple(p.name for p in parameters if p.kind != p.KEYWORD_ONLY)
    # Traced, not run: a bad option is found here, before any model is loaded.
    pair = [jax.ShapeDtypeStruct((1,), jnp.float32)] * len(reads)
    try:
        jax.eval_shape(functools.partial(loss, **options), *pair)
    except (TypeError, ValueError) as error:
        raise InputError(f"loss {loss.__name__}: {error}") from error
    defaults = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}
    options = defaults | options

    def pair_losses(logps, batch, state):
        del state  # a plain loss learns nothing beside the model
        arrays = pair_arrays(logps, batch)
        values = loss(*(arrays[name] for name in reads), **options)
        return jnp.where(batch.pairs >= 0, values * batch.weights, 0.0)

    def gradient(pair_logps, params, batch, state):
        def summed(params, micro):
            logps = pair_logps(params, micro)
            values = pair_losses(logps, micro, state)
            return jnp.sum(values), (logps, values)

        def accumulate(total, micro):
            (_, aux), grads = jax.value_and_grad(summed, has_aux=True)(params, micro)
            return jax.tree.map(jnp.add, total, grads), aux

        # Summed in float32 or wider, whatever the parameters are kept in.
        wide = lambda p: jnp.promote_types(p.dtype, jnp.float32)
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, wide(p)), params)
        total, (logps, values) = jax.lax.scan(accumulate, zeros, batch)
        divisor = jnp.maximum(count(batch), 1)
        mean = lambda g, p: (g / divisor.astype(g.dtype)).astype(p.dtype)
        grads = jax.tree.map(mean, total, params)
        bad = jnp.where(jnp.isfinite(values), -1, batch.pairs)
        metrics = {
            "loss": jnp.sum(values) / divisor,
            "nonfinite_pairs": replicated(bad),
        }
        metrics |= reward_metrics(logps, batch, reads, options)
        return grads, state, metrics

    return Objective(
        name=loss.__name__,
        options=options,
        reads=reads,
        init=dict,
        gradient=gradient,
        losses=pair_losses,
        count=count,
    )


def reward_metrics(
    logps: jax.Array,
    batch: PreferenceBatch,
    reads: tuple[str, ...],
    options: Mapping[str, Any],
) -> dict[str, jax.Array]:
    """Means over the pairs of log-probs and implicit rewards, under the field's names.

    Implicit rewards are in the loss's own convention: beta (log pi - log pi_ref) where
    it reads a reference, beta log pi where it does not, averaged over tokens where it
    averages them.  Ties count half in `rewards/accuracies`.
    """
    mask = batch.pairs >= 0
    pairs = jnp.maximum(jnp.sum(mask), 1)
    mean = lambda x: jnp.sum(jnp.where(mask, x, 0.0)) / pairs
    metrics = {"logps/chosen": mean(logps[..., 0])}
    if logps.shape[-1] == 1:
        return metrics
    rewards = options.get("beta", 1.0) * (logps - batch.reference_logps)
    if "chosen_lengths" in reads:
        rewards = rewards / jnp.maximum(batch.completion_lengths, 1)
    chosen, rejected = rewards[..., 0], rewards[..., 1]
    return metrics | {
        "logps/rejected": mean(logps[..., 1]),
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/accuracies": mean(losses.reward_accuracies(chosen, rejected)),
        "rewards/margins": mean(chosen - rejected),
    }
