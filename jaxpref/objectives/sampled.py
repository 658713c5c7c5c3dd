"""What objectives of sampled answers compute of a batch: groups, tokens, metrics.

The answers to a prompt are a group.  A batch has their rewards (`sampled_rewards`, NaN
for an answer without one) and, for each token, its log-probability under the parameters
that sampled it and under the reference.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref import losses
from jaxpref.data.batch import PreferenceBatch
from jaxpref.data.columns import SAMPLED
from jaxpref.errors import InputError
from jaxpref.objectives.bound_loss import PER_RECORD, Given
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.objective import Metrics, Objective, State

POLICY = "policy_token_logps"
SAMPLER = "sampler_token_logps"
REFERENCE = "reference_token_logps"

OfAnswers = Float[Array, "*batch S K"]
"""A number of each answer."""
OfTokens = Float[Array, "*batch Q P"]
"""A number of each target token."""
Rate = float | Given
"""A number, or `PER_RECORD`."""


class Clip(NamedTuple):
    """How far from 1 a ratio of probabilities counts."""

    low: float
    high: float


def checked(name: str, clip: Clip, beta: float) -> Clip:
    """The bounds.

    Raises:
      InputError: if they or the coefficient of the KL penalty are out of range.
    """
    if not 0 <= clip.low <= 1:
        raise InputError(f"{name}: clip_low {clip.low}: must be from 0 to 1")
    for option, value in (("clip_high", clip.high), ("beta", beta)):
        if not 0 <= value < float("inf"):
            raise InputError(f"{name}: {option} {value}: must be 0 or more and finite")
    return clip


def reads(beta: float) -> tuple[str, ...]:
    """What is read of a batch; the reference only for a KL penalty."""
    return SAMPLED, POLICY, SAMPLER, *((REFERENCE,) if beta else ())


def rewards(batch: PreferenceBatch) -> tuple[OfAnswers, Bool[Array, "*batch S K"]]:
    """The rewards of the answers, and which of them have one."""
    values = jnp.asarray(batch.numbers[SAMPLED])
    real = ~jnp.isnan(values) & (jnp.asarray(batch.completion_lengths) > 0)
    return jnp.where(real, values, 0), real


class Rates(NamedTuple):
    """How often a verifier errs; a number for all prompts, or `PER_RECORD`."""

    false_positive_rate: Rate
    false_negative_rate: Rate

    @property
    def per_record(self) -> tuple[str, ...]:
        """The rates that are numbers of the prompts."""
        return tuple(k for k, x in self._asdict().items() if x is PER_RECORD)


def returns_of(
    name: str, beta: float, rates: Rates
) -> Callable[[Inputs], tuple[OfAnswers, Bool[Array, "*batch S K"]]]:
    """The function R = r - beta log pi_old/ref, of answers that have a reward.

    Args:
      name: the objective's, for messages.
      beta: coefficient of the KL penalty.
      rates: those of `losses.unflipped_rewards`.

    Raises:
      InputError: if the rates are out of range.
    """
    options = rates._asdict()
    try:
        fixed = {k: x for k, x in options.items() if x is not PER_RECORD}
        losses.unflipped_rewards(jnp.zeros(()), **fixed)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error

    def returns(inputs: Inputs):
        values, real = rewards(inputs.batch)
        # Those of a prompt are the same for all its answers.
        own = {k: inputs[k][..., None] for k in rates.per_record}
        values = losses.unflipped_rewards(values, **{**options, **own})
        if beta:
            sampler, reference = (answer_logps(inputs, n) for n in (SAMPLER, REFERENCE))
            values = values - beta * losses.kl_k1(sampler - reference)
        return values, real

    return returns


def tokens(inputs: Inputs, name: str) -> OfTokens:
    """Log-probabilities or values of the target tokens; 0 for padding."""
    of_batch: Any = inputs.batch.token_numbers
    values = inputs.scores[name] if name in inputs.scores else of_batch[name]
    return jnp.where(jnp.asarray(inputs.batch.completions) >= 0, values, 0)


def of_answers(
    reduce: Callable[..., Array], values: OfTokens, inputs: Inputs
) -> OfAnswers:
    """Sums or means over the tokens of each answer."""
    shape = inputs.batch.completion_lengths.shape
    owners = cast(Array, inputs.batch.completions)
    found = reduce(values, owners, num_completions=shape[-2] * shape[-1])
    return jnp.reshape(found, shape)


def answer_logps(inputs: Inputs, name: str) -> OfAnswers:
    """Log-probabilities of the answers, summed over their tokens."""
    return of_answers(losses.sum_by_completion, tokens(inputs, name), inputs)


def of_tokens(
    values: OfAnswers, inputs: Inputs, *, at: Int[Array, "*batch Q P"] | None = None
) -> OfTokens:
    """The value of the answer that each token belongs to.

    Args:
      values: a number of each answer.
      inputs: the scores of a batch, and the batch.
      at: the answers of the tokens that get a value, and -1 for others (default: all).
    """
    owners = cast(Array, inputs.batch.completions) if at is None else at
    flat = jnp.reshape(values, (*values.shape[:-2], -1))
    return losses.of_each_token(flat, owners)


def clipped(log_ratios: Array, advantages: Array, clip: Clip) -> Array:
    """Whether a ratio is so far from 1 that there is no gradient."""
    ratio = jnp.exp(log_ratios)
    above = (ratio > 1 + clip.high) & (advantages > 0)
    return above | ((ratio < 1 - clip.low) & (advantages < 0))


def token_objective(
    name: str,
    options: Mapping[str, float],
    advantages_of: Callable[..., OfAnswers],
    reduced: Callable[[OfTokens, Inputs], Float[Array, "*batch S"]],
) -> Objective:
    """The objective of a clipped policy gradient of each token, with a KL penalty.

    Args:
      name: its name.
      options: `clip_low`, `clip_high`, and `beta`.
      advantages_of: `(rewards, where) -> advantages` of the groups.
      reduced: `(token losses, inputs) -> losses of the groups`.
    """
    beta = options["beta"]
    clip = checked(name, Clip(options["clip_low"], options["clip_high"]), beta)

    def advantages(inputs: Inputs) -> OfTokens:
        values, real = rewards(inputs.batch)
        return of_tokens(advantages_of(values, where=real), inputs)

    def group_losses(inputs: Inputs, state: State) -> Array:
        del state
        policy, sampler = (tokens(inputs, n) for n in (POLICY, SAMPLER))
        values = losses.clipped_policy_gradient(
            policy,
            sampler,
            advantages(inputs),
            clip_low=clip.low,
            clip_high=clip.high,
        )
        if beta:
            values += beta * losses.kl_k3(policy - tokens(inputs, REFERENCE))
        return reduced(values, inputs)

    def metrics(inputs: Inputs) -> Metrics:
        policy, sampler = (tokens(inputs, n) for n in (POLICY, SAMPLER))
        lost = clipped(policy - sampler, advantages(inputs), clip)
        real = jnp.asarray(inputs.batch.completions) >= 0
        return sample_metrics(inputs) | {"clipped": mean_over(lost * 1.0, real)}

    return Objective(
        name=name,
        options=dict(options),
        reads=reads(beta),
        losses=group_losses,
        metrics=metrics,
    )


def sample_metrics(inputs: Inputs) -> Metrics:
    """The metrics of all objectives of sampled answers, but `clipped`; see `grpo`."""
    values, real = rewards(inputs.batch)
    exists = jnp.asarray(inputs.batch.completion_lengths) > 0
    squares = jnp.square(losses.centered(values, where=real))
    others = jnp.maximum(jnp.sum(real, -1) - 1, 1)
    deviations = jnp.sqrt(jnp.sum(squares, -1) / others)
    uniform = ~losses.informative_groups(values, where=real)
    lengths = inputs.completions("lengths")
    found = {
        "rewards/mean": mean_over(values, real),
        "rewards/std": mean_over(deviations, inputs.is_pair),
        "rewards/uniform": mean_over(uniform * 1.0, inputs.is_pair),
        "rewards/missing": mean_over(~real * 1.0, exists),
        "lengths": mean_over(lengths, exists),
        "logps/token": mean_over(answer_logps(inputs, POLICY) / lengths, exists),
    }
    if REFERENCE in inputs.batch.token_numbers:
        ratios = tokens(inputs, SAMPLER) - tokens(inputs, REFERENCE)
        of_token = losses.kl_k3(ratios)
        kl = of_answers(losses.sum_by_completion, of_token, inputs)
        found["kl"] = mean_over(kl, exists)
    return found
