"""Objectives of answers that are sampled in training: policy gradients.

The answers to a prompt are a group.  A batch has their rewards (`sampled_rewards`, NaN
for an answer without one) and, for each token, its log-probability under the parameters
that sampled it and under the reference.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxpref import losses
from jaxpref.data.batch import PreferenceBatch
from jaxpref.errors import InputError
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.objective import Metrics, Objective, State, unit_weights
from jaxpref.objectives.sampled import (
    POLICY,
    SAMPLER,
    Clip,
    OfAnswers,
    Rate,
    Rates,
    answer_logps,
    checked,
    clipped,
    of_answers,
    reads,
    returns_of,
    rewards,
    sample_metrics,
    token_objective,
)


def grpo(
    *, clip_low: float = 0.2, clip_high: float = 0.2, beta: float = 0.04
) -> Objective:
    """Group relative policy optimization.

    Token losses are averaged within each answer, then over answers.

        loss = 1/K sum_i 1/|y_i| sum_t [-min(w A_i, clip(w) A_i) + beta k3]
        A_i  = (r_i - mean of the group) / its standard deviation
        w    = pi / pi_old of the token,    k3 = ref/pi - 1 - log ref/pi

    Metrics: those of all objectives of sampled answers.  `rewards/mean`; `rewards/std`,
    the mean standard deviation within a group; `rewards/uniform`, the share of groups
    of equal rewards, whose advantages are 0; `rewards/missing`, the share of answers
    without a reward, whose advantage is 0; `lengths`, mean tokens of an answer;
    `clipped`, the share of tokens (or answers) without a gradient because of clipping;
    `kl`, an estimate of KL(pi_old || ref) of an answer in nats, unless beta is 0.

    Args:
      clip_low: the ratio is clipped below 1 minus this, in [0, 1].
      clip_high: the ratio is clipped above 1 plus this, >= 0.
      beta: coefficient of the KL penalty, >= 0; 0 needs no reference.

    Raises:
      InputError: if an option is out of range.

    References:
      Shao et al., "DeepSeekMath", 2024, arXiv:2402.03300, Eqs. 3 and 4.
    """

    def reduced(values: Array, inputs: Inputs) -> Array:
        return jnp.mean(of_answers(losses.mean_by_completion, values, inputs), -1)

    options = {"clip_low": clip_low, "clip_high": clip_high, "beta": beta}
    return token_objective("grpo", options, losses.group_normalized, reduced)


def dr_grpo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    longest: int = 128,
) -> Objective:
    """Dr. GRPO: `grpo` without the division by lengths and standard deviations.

        loss = 1/(K longest) sum_i sum_t [-min(w A_i, clip(w) A_i) + beta k3]
        A_i  = r_i - mean of the group

    Long wrong answers are penalized per token as much as short ones, and prompts that
    are nearly always or nearly never solved do not count more than others.

    Metrics: those of `grpo`.

    Args:
      clip_low: the ratio is clipped below 1 minus this, in [0, 1].
      clip_high: the ratio is clipped above 1 plus this, >= 0.
      beta: coefficient of the KL penalty, >= 0; 0 needs no reference.
      longest: the constant that sums over tokens are divided by, such as
        --max-new-tokens.

    Raises:
      InputError: if an option is out of range.

    References:
      Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective", 2025,
      arXiv:2503.20783.
    """
    if longest < 1:
        raise InputError(f"dr_grpo: longest {longest}: must be at least 1")

    def reduced(values: Array, inputs: Inputs) -> Array:
        sums = of_answers(losses.sum_by_completion, values, inputs)
        return jnp.mean(sums, -1) / longest

    options = {"clip_low": clip_low, "clip_high": clip_high, "beta": beta}
    made = token_objective("dr_grpo", options, losses.centered, reduced)
    return dataclasses.replace(made, options={**options, "longest": longest})


def dapo(
    *, clip_low: float = 0.2, clip_high: float = 0.28, beta: float = 0.0
) -> Objective:
    """DAPO: the mean over all tokens of the groups whose rewards differ.

        loss = sum_i sum_t [-min(w A_i, clip(w) A_i) + beta k3] / sum_i |y_i|

    with the advantages A_i of `grpo`, over the answers of the whole batch.  Groups of
    equal rewards are left out; the authors sample others instead.  The penalty of long
    answers is --overlong-buffer.

    Metrics: those of `grpo`.

    Args:
      clip_low: the ratio is clipped below 1 minus this, in [0, 1].
      clip_high: the ratio is clipped above 1 plus this, >= 0.
      beta: coefficient of the KL penalty, >= 0; 0 needs no reference.

    Raises:
      InputError: if an option is out of range.

    References:
      Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
      2025, arXiv:2503.14476, Eqs. 8 to 12.
    """

    def reduced(values: Array, inputs: Inputs) -> Array:
        sums = of_answers(losses.sum_by_completion, values, inputs)
        return jnp.sum(sums, -1)

    def count(batch: PreferenceBatch) -> Array:
        tokens = jnp.sum(batch.completion_lengths, -1)
        return jnp.sum(jnp.where(_informative(batch), tokens, 0))

    options = {"clip_low": clip_low, "clip_high": clip_high, "beta": beta}
    made = token_objective("dapo", options, losses.group_normalized, reduced)
    weigh = lambda batch, state: unit_weights(batch, state) * _informative(batch)
    return dataclasses.replace(made, count=count, weigh=weigh)


def rloo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.05,
    false_positive_rate: Rate = 0.0,
    false_negative_rate: Rate = 0.0,
) -> Objective:
    """REINFORCE with the other answers to the prompt as the baseline.

        loss = 1/K sum_i -min(w A_i, clip(w) A_i),    w = pi / pi_old of the answer
        A_i  = R_i - mean over j != i of R_j,    R = r - beta log pi_old/ref

    On policy, with one update per sample, w = 1 and nothing is clipped.

    Metrics: those of `grpo`.

    Args:
      clip_low: the ratio is clipped below 1 minus this, in [0, 1].
      clip_high: the ratio is clipped above 1 plus this, >= 0.
      beta: coefficient of the KL penalty in the reward, >= 0; 0 needs no reference.
      false_positive_rate: probability that the reward of a wrong answer is 1, of an
        unreliable verifier; rewards must then be 0 or 1, and are corrected.
        `PER_RECORD` reads one for each prompt: --columns false_positive_rate=FIELD.
      false_negative_rate: probability that the reward of a right answer is 0.

    Raises:
      InputError: if an option is out of range.

    References:
      Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for
      Learning from Human Feedback in LLMs", 2024, arXiv:2402.14740; Wang, Liu, and Li,
      "Reinforcement Learning with Perturbed Rewards", 2020, arXiv:1810.01032, for the
      rates.
    """
    clip = checked("rloo", Clip(clip_low, clip_high), beta)
    rates = Rates(false_positive_rate, false_negative_rate)
    returns = returns_of("rloo", beta, rates)

    def advantages(inputs: Inputs) -> tuple[OfAnswers, Array]:
        values, real = returns(inputs)
        return losses.leave_one_out(values, where=real), real

    def group_losses(inputs: Inputs, state: State) -> Array:
        del state
        bounds = {"clip_low": clip.low, "clip_high": clip.high}
        policy, sampler = (answer_logps(inputs, name) for name in (POLICY, SAMPLER))
        value = losses.clipped_policy_gradient(
            policy, sampler, advantages(inputs)[0], **bounds
        )
        return jnp.mean(value, -1)

    def metrics(inputs: Inputs) -> Metrics:
        policy, sampler = (answer_logps(inputs, name) for name in (POLICY, SAMPLER))
        values, real = advantages(inputs)
        lost = clipped(policy - sampler, values, clip) & real
        return sample_metrics(inputs) | {"clipped": mean_over(lost * 1.0, real)}

    return Objective(
        name="rloo",
        options={
            **{"clip_low": clip_low, "clip_high": clip_high, "beta": beta},
            **rates._asdict(),
        },
        reads=(*reads(beta), *rates.per_record),
        losses=group_losses,
        metrics=metrics,
    )


def reinforce(
    *,
    beta: float = 0.05,
    decay: float = 0.9,
    false_positive_rate: Rate = 0.0,
    false_negative_rate: Rate = 0.0,
) -> Objective:
    """REINFORCE with a running mean of all rewards as the baseline.

        loss = 1/K sum_i -w (R_i - b),    w = pi / pi_old of the answer
        R    = r - beta log pi_old/ref,    b <- decay b + (1 - decay) mean R

    b is the mean of the steps before, divided by 1 - decay^steps, and 0 in the first
    one; steps without any reward do not count.  It is the same for all prompts, so the
    gradient varies more than that of `rloo`.

    Metrics: those of `grpo` but `clipped`, and `baseline`.

    Args:
      beta: coefficient of the KL penalty in the reward, >= 0; 0 needs no reference.
      decay: of the running mean, in [0, 1).
      false_positive_rate: see `rloo`.
      false_negative_rate: see `rloo`.

    Raises:
      InputError: if an option is out of range.

    References:
      Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist
      Reinforcement Learning", 1992; Ahmadian et al., "Back to Basics", 2024,
      arXiv:2402.14740, Eq. 5.
    """
    if not 0 <= decay < 1:
        raise InputError(f"reinforce: decay {decay}: must be in [0, 1)")
    checked("reinforce", Clip(0.0, 0.0), beta)
    rates = Rates(false_positive_rate, false_negative_rate)
    returns = returns_of("reinforce", beta, rates)

    def baseline(state: State) -> Array:
        return state["sum"] / jnp.maximum(state["weight"], 1e-30)

    def group_losses(inputs: Inputs, state: State) -> Array:
        values, real = returns(inputs)
        advantages = jnp.where(real, values - baseline(state), 0)
        policy, sampler = (answer_logps(inputs, name) for name in (POLICY, SAMPLER))
        return jnp.mean(losses.policy_gradient(policy, sampler, advantages), -1)

    def learn(inputs: Inputs, state: State) -> tuple[State, Metrics]:
        values, real = returns(inputs)
        # A step without rewards has no mean.
        new = {"sum": mean_over(values, real), "weight": jnp.any(real) * 1.0}
        kept = jnp.where(jnp.any(real), decay, 1.0)
        following = {k: kept * x + (1 - decay) * new[k] for k, x in state.items()}
        return following, {"baseline": baseline(state)}

    return Objective(
        name="reinforce",
        compares_samples=False,
        options={
            **{"beta": beta, "decay": decay},
            **rates._asdict(),
        },
        reads=(*reads(beta), *rates.per_record),
        losses=group_losses,
        metrics=sample_metrics,
        init=lambda num_annotators: {"sum": jnp.zeros(()), "weight": jnp.zeros(())},
        learn=learn,
    )


def sppo_online(*, beta: float = 0.001) -> Objective:
    """Self-play preference optimization, with win rates from the answers of a group.

        loss = 1/K sum_i beta d_i^2 - 2 (P_i - 1/2) d_i,    d = log pi/pi_old
        P_i  = mean over j != i of s(r_i - r_j)

    The authors' squared error of d_i and (P_i - 1/2) / beta, times beta and without its
    constant part.  The rewards are those of a Bradley-Terry model, such as a reward
    model's.  A general preference model gives mean scores over all answers, so with
    K > 2, P_i is not the mean of its own probabilities.  With one update per sample, it
    is a policy gradient with the advantage 2 (P_i - 1/2); the quadratic term has an
    effect only with --updates-per-sample above 1.

    Metrics: those of `grpo`, but `clipped` and `kl`.

    Args:
      beta: 1/eta, the inverse length of the step, > 0; the authors' is 0.001.

    Raises:
      InputError: if the option is out of range.

    References:
      Wu et al., "Self-Play Preference Optimization for Language Model Alignment", 2024,
      arXiv:2405.00675, Algorithm 1.
    """
    if not 0 < beta < float("inf"):
        raise InputError(f"sppo_online: beta {beta}: must be above 0 and finite")

    def group_losses(inputs: Inputs, state: State) -> Array:
        del state
        values, real = rewards(inputs.batch)
        rates = losses.win_rates(values, where=real)
        policy, sampler = (answer_logps(inputs, name) for name in (POLICY, SAMPLER))
        errors = losses.self_play_error(policy, sampler, rates, beta=beta)
        return jnp.mean(jnp.where(real, errors, 0), -1)

    return Objective(
        name="sppo_online",
        options={"beta": beta},
        reads=reads(0.0),
        losses=group_losses,
        metrics=sample_metrics,
    )


def gpo_online(*, beta: float = 0.001) -> Objective:
    """General preference optimization, with scores from the answers of a group.

        loss = 1/K sum_i beta d_i^2 - 2 s_i d_i,    d = log pi/pi_old
        s_i  = r_i - mean over j != i of r_j

    The authors' squared error of d_i and s_i / beta, times beta and without its
    constant part.  With a reward model trained by `general_preference`, which scores
    pairs of answers, s_i is the mean of s(y_i > y_j | x) / tau over the other answers,
    and preferences may be cyclic.  With a Bradley-Terry model, it is the mean log-odds
    of being preferred.  `sppo_online` has probabilities in place of scores.  With one
    update per sample, it is a policy gradient with the advantage 2 s_i; the quadratic
    term has an effect only with --updates-per-sample above 1.

    Metrics: those of `grpo`, but `clipped` and `kl`.

    Args:
      beta: the inverse length of the step, > 0; the authors' is 0.001.

    Raises:
      InputError: if the option is out of range.

    References:
      Zhang et al., "Beyond Bradley-Terry Models: A General Preference Model for
      Language Model Alignment", 2024, arXiv:2410.02197, General Preference
      Optimization.
    """
    if not 0 < beta < float("inf"):
        raise InputError(f"gpo_online: beta {beta}: must be above 0 and finite")

    def group_losses(inputs: Inputs, state: State) -> Array:
        del state
        values, real = rewards(inputs.batch)
        scores = losses.leave_one_out(values, where=real)
        policy, sampler = (answer_logps(inputs, name) for name in (POLICY, SAMPLER))
        errors = losses.preference_score_error(policy, sampler, scores, beta=beta)
        return jnp.mean(jnp.where(real, errors, 0), -1)

    return Objective(
        name="gpo_online",
        options={"beta": beta},
        reads=reads(0.0),
        losses=group_losses,
        metrics=sample_metrics,
    )


def _informative(batch: PreferenceBatch) -> Bool[Array, "*batch S"]:
    """Which groups have different rewards."""
    values, real = rewards(batch)
    return losses.informative_groups(values, where=real)
