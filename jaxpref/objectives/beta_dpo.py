"""beta-DPO as an objective: running statistics and selection of pairs."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.objectives.bound_loss import arrays_of, check_options
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.objective import Objective, State
from jaxpref.objectives.rewards import reward_metrics

STATISTICS = ("running_mean", "running_std")


READS = tuple(n for n in arrays_of(losses.beta_dpo) if n not in STATISTICS)


def beta_dpo(
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    drop_rate: float = 0.2,
    momentum: float = 0.9,
) -> Objective:
    """beta-DPO: beta follows the batch's margins, and unusual pairs are left out.

    Its state is the moving mean and standard deviation of the margins, and the number
    of batches so far, which seeds the random selection of each batch.  Evaluation uses
    all held-out pairs.

    Args:
      beta: beta of a batch with typical margins, > 0.
      alpha: how strongly beta follows the batch, per nat of margin, >= 0.
      drop_rate: share of a batch's pairs to leave out, in [0, 1); at least one pair
        stays.
      momentum: weight of the previous moments, in [0, 1].

    Raises:
      InputError: if an option is out of range.
    """
    if not 0 <= drop_rate < 1:
        raise InputError(f"loss beta_dpo: drop_rate {drop_rate}: must be in [0, 1)")
    if not 0 <= momentum <= 1:
        raise InputError(f"loss beta_dpo: momentum {momentum}: must be in [0, 1]")
    options = {"beta": beta, "alpha": alpha}
    check_options(losses.beta_dpo, options, *STATISTICS)

    def pair_losses(inputs: Inputs, state: State) -> Array:
        constant = inputs.constant()
        statistics = moments(constant, state, momentum)
        where = selected(constant, state["batches"], *statistics, drop_rate)
        values = loss_of(inputs, *statistics, where, options)
        # Rescaled so that the result is the mean over the selected pairs.
        values *= jnp.sum(inputs.is_pair) / jnp.maximum(jnp.sum(where), 1)
        return jnp.where(where, values, 0.0)

    def learn(inputs: Inputs, state: State) -> tuple[State, dict]:
        mean, std = moments(inputs, state, momentum)
        batches = state["batches"] + 1
        return {"running_mean": mean, "running_std": std, "batches": batches}, {}

    def evaluate(inputs: Inputs, state: State) -> tuple[Array, dict]:
        mean, std = (state[name] for name in STATISTICS)
        return loss_of(inputs, mean, std, inputs.is_pair, options), {}

    return Objective(
        name="beta_dpo",
        options=options | {"drop_rate": drop_rate, "momentum": momentum},
        reads=READS,
        losses=pair_losses,
        metrics=reward_metrics(READS, options, per_token=False),
        init=init,
        learn=learn,
        evaluate=evaluate,
        couples=READS,
    )


def init(num_annotators: int) -> State:
    """The initial state: moments of no batch."""
    del num_annotators
    zero = lambda: jnp.zeros((), jnp.float32)
    batches = jnp.zeros((), jnp.int32)
    return {"running_mean": zero(), "running_std": zero(), "batches": batches}


def margins(inputs: Inputs) -> Array:
    """Log-ratio of the chosen answer minus that of the rejected answer, [..., S]."""
    chosen = inputs["policy_chosen_logps"] - inputs["reference_chosen_logps"]
    rejected = inputs["policy_rejected_logps"] - inputs["reference_rejected_logps"]
    return chosen - rejected


def moments(inputs: Inputs, state: State, momentum: float) -> tuple[Array, Array]:
    """The running mean and standard deviation, updated with this batch."""
    return losses.margin_moments(
        margins(inputs),
        state["running_mean"],
        state["running_std"],
        momentum=momentum,
        where=inputs.is_pair,
    )


def selected(
    inputs: Inputs, batches: Array, mean: Array, std: Array, drop_rate: float
) -> Array:
    """The pairs of a batch to train on, bool [..., S]."""
    # At least one pair stays, however small the batch is.
    all_but_one = 1 - 1 / jnp.maximum(jnp.sum(inputs.is_pair), 1)
    return losses.beta_dpo_selection(
        margins(inputs),
        mean,
        std,
        jax.random.fold_in(jax.random.key(0), batches),
        drop_rate=jnp.minimum(drop_rate, all_but_one),
        where=inputs.is_pair,
    )


def loss_of(
    inputs: Inputs,
    mean: Array,
    std: Array,
    where: Array,
    options: Mapping[str, float],
) -> Array:
    """The loss of the pairs in `where`, with the beta of their batch."""
    arrays = dict(zip(READS, inputs.arrays(READS)))
    arrays |= {"running_mean": mean, "running_std": std}
    ordered = (arrays[name] for name in arrays_of(losses.beta_dpo))
    return losses.beta_dpo(*ordered, **options, where=where)
