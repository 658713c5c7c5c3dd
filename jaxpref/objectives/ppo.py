"""PPO: a clipped policy gradient of each token, with a learned value function."""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxpref import losses
from jaxpref.data.batch import PreferenceBatch
from jaxpref.errors import InputError
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.objective import Metrics, Objective, State
from jaxpref.objectives.sampled import (
    POLICY,
    REFERENCE,
    SAMPLER,
    Clip,
    OfTokens,
    checked,
    clipped,
    of_answers,
    of_tokens,
    reads,
    rewards,
    sample_metrics,
    tokens,
)
from jaxpref.scoring.scores import TokenValues, last_tokens

VALUES = "policy_token_values"
SAMPLER_VALUES = "sampler_token_values"
ADVANTAGES, RETURNS = "token_advantages", "token_returns"
"""Numbers of the tokens of a complete batch: Z_t and R_t."""


def ppo_clip(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.05,
    gae_lambda: float = 0.95,
    gamma: float = 1.0,
    value_coefficient: float = 0.1,
    clip_value: float = 0.2,
    whiten_advantages: bool = True,
) -> Objective:
    """Proximal policy optimization with a value head on the policy.

    The mean over all tokens of the batch of

        -min(w_t Z_t, clip(w_t) Z_t) + c/2 max((V_t - R_t)^2, (clip(V_t) - R_t)^2)
        A_t = sum over l >= 0 of (gamma lambda)^l d_{t+l},    R_t = A_t + V_old,t
        Z_t = (A_t - mean of A) / standard deviation of A, over all tokens of the batch
        d_t = r_t + gamma V_old,t+1 - V_old,t,    w_t = pi / pi_old of the token
        r_t = -beta log pi_old/ref of the token, plus the reward at the last one

    V_t is a linear function of the hidden state before token t.  Its head starts at 0
    and is trained with the model; it is in checkpoints, but not in the exported model.
    V_old and pi_old are those of the parameters that sampled the answer.

    Metrics: those of `grpo`; `values/mean`, the mean of V_old over tokens;
    `values/explained`, the share of the variance of R that V_old explains, 1 - var(A) /
    var(R), or NaN if all R are equal.

    Args:
      clip_low: the ratio is clipped below 1 minus this, in [0, 1].
      clip_high: the ratio is clipped above 1 plus this, >= 0.
      beta: coefficient of the KL penalty in the reward, >= 0; 0 needs no reference.
      gae_lambda: lambda, from 0 (one-step errors) to 1 (returns minus values).
      gamma: discount of later rewards, in [0, 1].
      value_coefficient: c, weight of the value function's error, >= 0.
      clip_value: how far a value may move from V_old, > 0, in units of the reward.
      whiten_advantages: whether to standardize advantages, as TRL and OpenRLHF do; if
        not, Z = A.

    Raises:
      InputError: if an option is out of range.

    References:
      Schulman et al., "Proximal Policy Optimization Algorithms", 2017,
      arXiv:1707.06347, Eqs. 7 and 9; Schulman et al., "High-Dimensional Continuous
      Control Using Generalized Advantage Estimation", 2015, arXiv:1506.02438; Stiennon
      et al., "Learning to Summarize from Human Feedback", 2020, arXiv:2009.01325, for
      the penalty in the reward.
      Code: openai/baselines, ppo2/model.py, for the clipped values.
    """
    clip = checked("ppo_clip", Clip(clip_low, clip_high), beta)
    _check(gae_lambda, gamma, value_coefficient, clip_value)

    def complete(batch: PreferenceBatch) -> PreferenceBatch:
        received = _received(batch, beta)
        return _with_advantages(
            batch,
            received,
            functools.partial(losses.gae, discount=gamma, trace=gae_lambda),
            whiten=whiten_advantages,
        )

    def group_losses(inputs: Inputs, state: State) -> Array:
        del state
        policy, sampler = (tokens(inputs, n) for n in (POLICY, SAMPLER))
        values, old = (tokens(inputs, n) for n in (VALUES, SAMPLER_VALUES))
        advantages, returns = (tokens(inputs, n) for n in (ADVANTAGES, RETURNS))
        of_policy = losses.clipped_policy_gradient(
            policy, sampler, advantages, clip_low=clip.low, clip_high=clip.high
        )
        of_values = losses.clipped_value_error(values, old, returns, clip=clip_value)
        both = jnp.where(
            _rewarded(inputs), of_policy + value_coefficient * of_values, 0
        )
        return jnp.sum(of_answers(losses.sum_by_completion, both, inputs), -1)

    def metrics(inputs: Inputs) -> Metrics:
        policy, sampler = (tokens(inputs, n) for n in (POLICY, SAMPLER))
        advantages, returns = (tokens(inputs, n) for n in (ADVANTAGES, RETURNS))
        old, real = tokens(inputs, SAMPLER_VALUES), _rewarded(inputs)
        variance = lambda x: mean_over(jnp.square(x - mean_over(x, real)), real)
        of_returns, squares = variance(returns), mean_over(jnp.square(returns), real)
        # If returns are equal up to rounding, there is no variance to explain.
        explained = jnp.where(
            of_returns > 1e-10 * squares,
            1 - variance(returns - old) / of_returns,
            jnp.nan,
        )
        lost = clipped(policy - sampler, advantages, clip)
        return sample_metrics(inputs) | {
            "clipped": mean_over(lost * 1.0, real),
            "values/mean": mean_over(old, real),
            "values/explained": explained,
        }

    return Objective(
        name="ppo_clip",
        compares_samples=False,
        options={
            **{"clip_low": clip_low, "clip_high": clip_high, "beta": beta},
            **{"gae_lambda": gae_lambda, "gamma": gamma},
            **{"value_coefficient": value_coefficient, "clip_value": clip_value},
            "whiten_advantages": whiten_advantages,
        },
        reads=(*reads(beta), VALUES, SAMPLER_VALUES),
        losses=group_losses,
        metrics=metrics,
        complete=complete,
        count=lambda batch: jnp.sum(batch.completion_lengths),
        heads=TokenValues(),
    )


def _check(
    gae_lambda: float, gamma: float, value_coefficient: float, clip_value: float
) -> None:
    """Raises InputError if an option is out of range."""
    for option, value in (("gae_lambda", gae_lambda), ("gamma", gamma)):
        if not 0 <= value <= 1:
            raise InputError(f"ppo_clip: {option} {value}: must be from 0 to 1")
    if not 0 <= value_coefficient < float("inf"):
        raise InputError(
            f"ppo_clip: value_coefficient {value_coefficient}: must be 0 or more and "
            "finite"
        )
    if not 0 < clip_value < float("inf"):
        raise InputError(
            f"ppo_clip: clip_value {clip_value}: must be above 0 and finite"
        )


def _received(batch: PreferenceBatch, beta: float) -> OfTokens:
    """The reward r_t of each token, of the answer and of the divergence."""
    inputs = Inputs({}, batch)
    of_answer, _ = rewards(batch)
    received = of_tokens(of_answer, inputs, at=_last(batch))
    if beta:
        ratios = tokens(inputs, SAMPLER) - tokens(inputs, REFERENCE)
        received = received - beta * losses.kl_k1(ratios)
    return received


def _with_advantages(
    batch: PreferenceBatch,
    received: OfTokens,
    advantages_of: Callable[..., Array],
    *,
    whiten: bool,
) -> PreferenceBatch:
    """The whole batch with the advantages and returns of its tokens.

    Args:
      batch: the whole batch.
      received: the reward of each token.
      advantages_of: `losses.gae` with its options.
      whiten: whether to standardize the advantages over the batch.
    """
    inputs = Inputs({}, batch)
    old, real = tokens(inputs, SAMPLER_VALUES), _rewarded(inputs)
    owners = jnp.asarray(batch.completions)
    found = jnp.where(real, advantages_of(received, old, completions=owners), 0)
    more = {RETURNS: found + old, ADVANTAGES: found}
    if whiten:
        more[ADVANTAGES] = losses.whitened(found, where=real)
    numbers = {**batch.token_numbers, **more}
    return dataclasses.replace(batch, token_numbers=numbers)


def _last(batch: PreferenceBatch) -> Array:
    """The answers of their last tokens; -1 for all other tokens."""
    return last_tokens(jnp.asarray(batch.completions))


def _rewarded(inputs: Inputs) -> Bool[Array, "*batch Q P"]:
    """Which tokens belong to an answer that has a reward."""
    _, real = rewards(inputs.batch)
    return of_tokens(real * 1.0, inputs) > 0
