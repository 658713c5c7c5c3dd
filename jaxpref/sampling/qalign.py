"""QAlign: answers from the tilted distribution, by Markov chain Monte Carlo.

The target is what KL-regularized alignment would converge to:

    p(y | x) = pi(y | x) exp(r(x, y) / beta) / Z(x)

A step keeps the first tokens of the answer, as many as a uniform draw from
0, ..., |y| - 1 says, and draws the rest from the model again.  The new answer y' is
accepted with probability

    min(1, exp((r(x, y') - r(x, y)) / beta) |y| / |y'|),

because the model's probabilities of the two suffixes cancel.  Longer chains come closer
to the target, and do not leave it for errors of the reward as best-of-n does.  Faria
and Smith 2025, arXiv:2504.03790; the proposal is that of QUEST (Faria et
al. 2024, arXiv:2406.00049).
"""

from collections.abc import Callable, Sequence, Sized
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int

Text = TypeVar("Text", bound=Sized)
Propose = Callable[[int, Sequence[Text], Int[np.ndarray, " C"]], Sequence[Text]]
"""`propose(step, texts, kept)`: for each text, its first `kept` tokens, with a
continuation by the model."""
Reward = Callable[[Sequence[Text]], Float[np.ndarray, " C"]]
"""r(x, y) of the current text of each chain."""


def qalign(
    texts: Sequence[Text],
    propose: Propose[Text],
    reward: Reward[Text],
    *,
    steps: int,
    beta: float,
    seed: int,
    ids: Sequence[tuple[int, int]] | None = None,
) -> list[list[Text]]:
    """Runs C independent chains.

    Args:
        texts: C samples of the model, none of them empty; the chains start from these.
        propose: see `Propose`.
        reward: see `Reward`.  A text whose reward is NaN is never accepted.
        steps: steps of each chain.
        beta: the coefficient of the KL divergence, above 0, in units of the reward.
        seed: of the draws.
        ids: two numbers for each chain (default: 0 and its index); its draws depend on
            the seed, these, and the step alone.

    Returns:
        The C texts after 0, ..., `steps` steps.
    """
    ids = [(0, n) for n in range(len(texts))] if ids is None else ids
    rewards = np.asarray(reward(texts), float)
    states = [list(texts)]
    for step in range(1, steps + 1):
        draws = np.array(
            [np.random.default_rng([seed, step, *x]).random(2) for x in ids]
        )
        lengths = np.array([len(text) for text in states[-1]])
        kept = (draws[:, 0] * lengths).astype(int)
        found = list(propose(step, states[-1], kept))
        new = np.asarray(reward(found), float)
        new_lengths = np.array([len(text) for text in found])
        accept = acceptance(rewards, new, lengths, new_lengths, beta=beta)
        accepted = draws[:, 1] < accept
        rewards = np.where(accepted, new, rewards)
        each = zip(accepted, found, states[-1], strict=True)
        states.append([new if yes else old for yes, new, old in each])
    return states


def acceptance(
    rewards: Float[np.ndarray, " C"],
    new_rewards: Float[np.ndarray, " C"],
    lengths: Int[np.ndarray, " C"],
    new_lengths: Int[np.ndarray, " C"],
    *,
    beta: float,
) -> Float[np.ndarray, " C"]:
    """min(1, exp((r' - r) / beta) |y| / |y'|), the Metropolis-Hastings probability.

    0 if r' is NaN, and 1 if only r is.
    """
    gain = (new_rewards - rewards) / beta + np.log(lengths / new_lengths)
    found = np.exp(np.minimum(gain, 0.0))
    found = np.where(np.isnan(rewards), 1.0, found)
    return np.where(np.isnan(new_rewards), 0.0, found)
