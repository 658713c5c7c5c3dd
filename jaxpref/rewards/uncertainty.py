"""How uncertain the rewards of a reward model are.

That is the standard deviation of each reward and of the margin of a pair, and the
probability that its chosen answer is better.  Rewards are random because the head is:
its features are dropped, or it is one of an ensemble, or has a posterior.  The
mathematics is in `jaxpref.noise`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import expit

from jaxpref.errors import InputError
from jaxpref.models.reward_head import Head as RewardHead
from jaxpref.models.weights import head_of
from jaxpref.noise.calibration import fit_temperature
from jaxpref.noise.dropout import dropout_rewards, record_keys
from jaxpref.noise.linear_head import (
    HeadPosterior,
    evidence_precision,
    expected_probability,
    laplace,
    resampled_heads,
)
from jaxpref.rewards.answered import Answered
from jaxpref.rewards.models import ModelReward, in_memory, score

Features = list[Float[np.ndarray, "K D"]]
"""For each prompt, what the head reads of each answer; NaN if it has none."""
Samples = list[Float[np.ndarray, "T K"]]
"""For each prompt, rewards of its answers under T random heads."""


@dataclasses.dataclass(frozen=True)
class Uncertain:
    """The rewards of the answers to a prompt, and how uncertain they are."""

    rewards: Float[np.ndarray, " K"]
    """The mean."""
    std: Float[np.ndarray, " K"]
    """Standard deviations, in nats like the rewards.  Rewards are determined up to a
    constant, so these are relative to a typical answer."""
    spread: Float[np.ndarray, " K"]
    """The same relative to the mean of the answers to the prompt, as in `lower_bound`.
    """
    margin_std: float
    """That of the first answer's reward minus the second's; NaN without a second."""
    p_chosen: float
    """The mean probability that the first answer is better than the second."""


@dataclasses.dataclass(frozen=True)
class Head:
    """A reward model with a linear head."""

    reward: ModelReward
    params: Any
    """All parameters of the model."""
    weights: Float[Array, " D"]
    """Those of the head, float32."""

    def features(self, answered: Sequence[Answered]) -> Features:
        """What the head reads of each answer."""
        reward = self.reward
        name, options = reward.name, reward.options
        return score(
            reward.weights, "features", answered, options, name, params=self.params
        )

    def differences(self, answered: Sequence[Answered], flag: str) -> jax.Array:
        """Features of the chosen answers of pairs minus those of the rejected ones.

        Raises:
          InputError: if a record is not a pair, or none can be read.
        """
        check_pairs(answered, flag)
        found = np.array([x[0] - x[1] for x in self.features(answered)])
        found = found[np.isfinite(found).all(1)] if len(found) else found
        if not len(found):
            raise InputError(f"{flag}: holds no pair that the model can read")
        return jnp.asarray(found, jnp.float32)


def check_pairs(answered: Sequence[Answered], flag: str) -> None:
    """Raises InputError, naming the first record that is not a pair."""
    for one in answered:
        if one.record.get("rejected") is None or len(one.texts) != 2:
            raise InputError(
                f"{one.place}: {flag} must hold pairs; give each record the fields "
                "'chosen' and 'rejected'"
            )


def load_head(reward: ModelReward) -> Head:
    """Loads a reward model.

    Raises:
      InputError: if its head is not linear with one output.
    """
    if head_of(reward.weights) != RewardHead():
        raise InputError(
            f"--reward {reward.name}: --uncertainty needs a linear head with one "
            "output; give several reward models with --uncertainty ensemble"
        )
    params = reward.params
    if params is None:
        params, _ = in_memory(reward.weights, reward.options)
    weights = params["score"]
    return Head(reward, params, jnp.asarray(jax.device_get(weights)[:, 0], jnp.float32))


Predict = Callable[[Sequence[Answered]], list[Uncertain]]
"""Says how uncertain the rewards of answers are."""


@dataclasses.dataclass(frozen=True)
class LowerBound:
    """The reward of one model, less a multiple of its standard deviation.

        mean of r(y_k) - weight * std of [r(y_k) - mean over k of r]

    over random heads.  `lower_bound` is the same with the rewards of several models.
    """

    predict: Predict
    weight: float
    """Of the standard deviation, >= 0."""

    def __call__(self, answered: Sequence[Answered]) -> list[Float[np.ndarray, " K"]]:
        """See `Reward`."""
        return [x.rewards - self.weight * x.spread for x in self.predict(answered)]


def by_dropout(head: Head, *, rate: float, passes: int, seed: int) -> Predict:
    """Dropout on the input of the head, with one mask for all answers to a prompt."""

    def predict(answered: Sequence[Answered]) -> list[Uncertain]:
        features = head.features(answered)
        records = jnp.array([_number(x) for x in answered], jnp.uint32)
        most = max(map(len, features))
        padded = [np.pad(x, ((0, most - len(x)), (0, 0))) for x in features]
        found = np.asarray(
            dropout_rewards(
                jnp.asarray(np.array(padded), jnp.float32),
                head.weights,
                record_keys(seed, records),
                rate=rate,
                passes=passes,
            )
        )
        samples = [found[:, n, : len(x)] for n, x in enumerate(features)]
        return [
            dataclasses.replace(uncertain, rewards=x @ np.asarray(head.weights))
            for uncertain, x in zip(of_samples(samples), features, strict=True)
        ]

    return predict


def by_resampling(
    head: Head, fit_data: Sequence[Answered], *, passes: int, seed: int
) -> Predict:
    """Heads that are fitted to pairs drawn from `fit_data` with replacement."""
    differences = head.differences(fit_data, "--fit-data")
    precision = evidence_precision(differences, head.weights)
    key = jax.random.key(seed)
    heads = np.asarray(
        resampled_heads(differences, key, members=passes, prior_precision=precision)
    )

    def predict(answered: Sequence[Answered]) -> list[Uncertain]:
        features = head.features(answered)
        return of_samples(_centered([heads @ x.T for x in features]))

    return predict


def by_laplace(head: Head, fit_data: Sequence[Answered]) -> Predict:
    """The posterior of the head, given the pairs that the model was trained on."""
    differences = head.differences(fit_data, "--fit-data")
    posterior = laplace(differences, head.weights)

    def predict(answered: Sequence[Answered]) -> list[Uncertain]:
        return of_posterior(posterior, head.features(answered))

    return predict


def of_models(rewards: Sequence[list[Float[np.ndarray, " K"]]]) -> list[Uncertain]:
    """Those of an ensemble of several rewards, each for all prompts."""
    samples = [np.stack(own) for own in zip(*rewards, strict=True)]
    return of_samples(_centered(samples))


def of_posterior(posterior: HeadPosterior, features: Features) -> list[Uncertain]:
    """From the posterior of the head.

    Standard deviations are those of the difference to the mean of all answers.
    """
    every = jnp.asarray(np.concatenate(features), jnp.float32)
    rewards, stds = every @ posterior.mean, every - jnp.nanmean(every, axis=0)[None]
    ends = np.cumsum([len(x) for x in features])[:-1]
    relative = jnp.asarray(np.concatenate([_relative(x) for x in features]))
    rewards, stds, spreads = (
        np.split(np.asarray(x), ends)
        for x in (
            rewards,
            jnp.sqrt(posterior.variance(stds)),
            jnp.sqrt(posterior.variance(relative)),
        )
    )
    none = np.full(len(posterior.mean), np.nan)
    differences = [x[0] - x[1] if len(x) > 1 else none for x in features]
    differences = jnp.asarray(np.array(differences), jnp.float32)
    variances = posterior.variance(differences)
    p_chosen = expected_probability(differences @ posterior.mean, variances)
    of_pairs = (np.asarray(jnp.sqrt(variances)).tolist(), np.asarray(p_chosen).tolist())
    numbers = zip(rewards, stds, spreads, *of_pairs, strict=True)
    return [Uncertain(*own) for own in numbers]


def of_samples(samples: Samples) -> list[Uncertain]:
    """From rewards under random heads: means, standard deviations, and mean s(m)."""
    return [_of_sample(x) for x in samples]


def calibrated(found: list[Uncertain], temperature: float) -> list[Uncertain]:
    """The same with the log-odds of `p_chosen` divided by a temperature."""
    probabilities = np.array([x.p_chosen for x in found])
    scaled = expit(_logit(probabilities) / temperature)
    return [
        dataclasses.replace(x, p_chosen=float(p))
        for x, p in zip(found, scaled, strict=True)
    ]


def temperature_of(predict: Predict, heldout: Sequence[Answered], flag: str) -> float:
    """The temperature under which the labels of held-out pairs are most likely.

    Raises:
      InputError: if no pair can be read, or a record is not a pair.
    """
    check_pairs(heldout, flag)
    found = np.array([x.p_chosen for x in predict(heldout)])
    if not np.isfinite(found).any():
        raise InputError(f"{flag}: holds no pair that the model can read")
    logits = jnp.asarray(_logit(np.nan_to_num(found, nan=0.5)), jnp.float32)
    right = jnp.ones(len(found))
    return float(fit_temperature(logits, right, where=jnp.isfinite(found)).temperature)


def _of_sample(sample: Float[np.ndarray, "T K"]) -> Uncertain:
    margin_std = p_chosen = np.nan
    if sample.shape[1] > 1:
        margins = sample[:, 0] - sample[:, 1]
        margin_std = float(margins.std())
        p_chosen = float(np.mean(expit(margins)))
    spread = _relative(sample.T).std(1)
    return Uncertain(sample.mean(0), sample.std(0), spread, margin_std, p_chosen)


def _relative(values: Float[np.ndarray, "K n"]) -> Float[np.ndarray, "K n"]:
    """Numbers of the answers to a prompt, less the mean of those that are known."""
    known = np.isfinite(values).all(1)
    return values - values[known].mean(0) if known.any() else values


def _centered(samples: Samples) -> Samples:
    """Each member's rewards, shifted to the mean of all members over all answers.

    The rewards of a model are determined up to a constant.
    """
    means = np.nanmean(np.concatenate(samples, axis=1), axis=1, keepdims=True)
    return [x - means + means.mean() for x in samples]


def _logit(p: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    p = np.clip(p, 1e-7, 1 - 1e-7)
    return np.log(p) - np.log1p(-p)


def _number(answered: Answered) -> int:
    """32 bits of the hash of a record's prompt and answers."""
    text: Any = json.dumps([answered.prompt, answered.texts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
