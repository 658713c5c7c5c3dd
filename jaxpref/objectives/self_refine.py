"""SPA's noise-aware refinement: softer labels for the least certain pairs."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.errors import InputError
from jaxpref.noise.em import likelihood_loss
from jaxpref.objectives.bound_loss import Loss, bind
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.learned_noise import wrapping
from jaxpref.objectives.objective import Objective, State
from jaxpref.sharding import replicated


def self_refine(
    loss: Loss, *, smoothing: float = 0.1, share: float = 0.1, memory: int = 64
) -> Objective:
    """SPA's refinement: the least certain pairs get smoothed labels.

        right = 1 if z > t, else 1 - smoothing,
        loss  = -right log s(z) - (1 - right) log s(-z)

    z is the loss's preference logit (DPO: beta times the difference of log-ratios)
    without gradient in `right`, and t the `share`-quantile of the logits of the last
    `memory` pairs.  Until there are as many, all labels count as right.  For labels
    that a model gives to its own answers.

    The authors may compute z from the extrapolated logits mix * policy + (1 - mix) *
    reference.  This is the default of their code, mix = 1.  They take the quantile of
    the means of the last 50 batches, from a fifth of the run on.

    Args:
      loss: a pairwise loss, or a `functools.partial` that sets hyperparameters.
      smoothing: probability that the label of an uncertain pair is wrong, in [0, 1/2].
      share: share of the pairs that are uncertain, in (0, 1).
      memory: pairs from which the quantile is estimated, >= 1.  A run with fewer pairs
        in all smooths no label.

    Raises:
      InputError: if an option is wrong, or the loss couples the pairs of a batch.

    References:
      Kim et al., "Spread Preference Annotation: Direct Preference Judgment for
      Efficient LLM Alignment", ICLR 2025, arXiv:2406.04412, Eq. 8 to 11.
      kingdy2002/SPA, trl/trl/trainer/dpo_trainer.py, "distill".
    """
    if not 0 <= smoothing <= 0.5:
        raise InputError(f"self_refine: smoothing {smoothing}: must be in [0, 1/2]")
    if not 0 < share < 1:
        raise InputError(f"self_refine: share {share}: must be in (0, 1)")
    if memory < 1:
        raise InputError(f"self_refine: memory {memory}: must be at least 1")
    bound = bind(loss)
    logits = bound.logits()

    def is_certain(z: Array, state: State) -> Array:
        limit = jnp.nanquantile(state["logits"], share)
        return (z > limit) | (state["count"] < memory)

    def pair_losses(inputs: Inputs, state: State) -> Array:
        certain = is_certain(logits(inputs.constant()), state)
        return likelihood_loss(logits(inputs), jnp.where(certain, 1, 1 - smoothing))

    def learn(inputs: Inputs, state: State) -> tuple[State, dict]:
        z, real = logits(inputs), inputs.is_pair
        metrics = {"noise/uncertain": mean_over(~is_certain(z, state), real)}
        return _with(state, replicated(z), replicated(real)), metrics

    def init(num_annotators: int) -> State:
        del num_annotators
        return {
            "logits": jnp.full(memory, jnp.nan, jnp.float32),
            "count": jnp.zeros((), jnp.int32),
        }

    return wrapping(
        "self_refine",
        bound,
        {"smoothing": smoothing, "share": share, "memory": memory},
        losses=pair_losses,
        init=init,
        learn=learn,
    )


def _with(state: State, z: Float[Array, "*batch S"], real: Array) -> State:
    """The state with the logits of a batch in place of the oldest ones."""
    z, real = jnp.ravel(z), jnp.ravel(real)
    memory, rank = len(state["logits"]), jnp.cumsum(real) - 1
    total = jnp.sum(real)
    # Of a batch with more pairs than `memory`, the last ones.
    kept = real & (rank >= total - memory)
    places = jnp.where(kept, (state["count"] + rank) % memory, memory)
    logits = state["logits"].at[places].set(z.astype(jnp.float32), mode="drop")
    # Only whether it has reached `memory`, and its remainder, matter.
    count = state["count"] + total
    count = jnp.where(count >= 2 * memory, memory + count % memory, count)
    return {"logits": logits, "count": count}
