"""Transfer Q*: tokens by the reward of complete answers that would follow them.

    p(v | x, y) = rho(v | x, y) exp(Q(x, y, v) / alpha) / Z
    Q(x, y, v) = E_{z ~ rho_BL(. | x, y, v)} [r(x, y v z)]

rho is the model, and rho_BL a baseline that is already aligned, possibly to a different
reward; Q is a mean over rollouts of it.  The top k tokens of rho are considered.
Chakraborty et al. 2024, arXiv:2405.20495.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

Tokens = tuple[int, ...]
Candidates = tuple[Int[np.ndarray, "B k"], Float[np.ndarray, "B k"]]
"""The k most likely next tokens of each text, and their log-probabilities in nats."""


def tilted(
    logps: Float[np.ndarray, "... k"],
    values: Float[np.ndarray, "... k"],
    *,
    alpha: float,
) -> Float[np.ndarray, "... k"]:
    """Probabilities rho(v) exp(Q(v) / alpha) / Z of the candidates.

    Args:
        logps: log rho(v) in nats.
        values: Q(v); a candidate for which it is not finite gets probability 0.  If no
            candidate has a finite one, their probabilities are proportional to rho.
        alpha: the coefficient of the KL divergence, above 0, in units of the reward.
    """
    known = np.isfinite(logps) & np.isfinite(values)
    none = ~known.any(axis=-1, keepdims=True)
    z = np.where(known | none, logps + np.where(known, values, 0.0) / alpha, -np.inf)
    p = np.exp(z - np.max(z, axis=-1, keepdims=True))
    return p / np.sum(p, axis=-1, keepdims=True)


def transfer_q(
    count: int,
    candidates: Callable[[Sequence[int], Sequence[Tokens]], Candidates],
    values: Callable[[int, Sequence[int], Sequence[Tokens]], Float[np.ndarray, " m"]],
    ended: Callable[[Tokens], bool],
    *,
    max_new_tokens: int,
    alpha: float,
    seed: int,
    ids: Sequence[tuple[int, int]] | None = None,
) -> list[Tokens]:
    """Decodes `count` answers, token by token.

    Args:
        count: the number of answers.
        candidates: `candidates(numbers, texts)`: see `Candidates`, for answers by
            number with the tokens they have so far.
        values: `values(step, numbers, texts)`: Q of each text, which ends with a
            candidate; the texts of an answer follow each other.
        ended: whether an answer is complete.
        max_new_tokens: maximum tokens of an answer.
        alpha: see `tilted`.
        seed: of the draws.
        ids: two numbers for each answer (default: 0 and its index); its draws depend on
            the seed, these, and the step alone.
    """
    ids = [(0, n) for n in range(count)] if ids is None else ids
    answers: list[Tokens] = [()] * count
    for step in range(max_new_tokens):
        open_ = [n for n in range(count) if not (answers[n] and ended(answers[n]))]
        if not open_:
            break
        tokens, logps = candidates(open_, [answers[n] for n in open_])
        # Of tokens that the model cannot choose, no value is needed.
        places = [(row, k) for row, k in np.argwhere(np.isfinite(logps)).tolist()]
        numbers = [open_[row] for row, _ in places]
        texts = [(*answers[open_[row]], int(tokens[row, k])) for row, k in places]
        found = np.full(tokens.shape, np.nan)
        found[tuple(np.transpose(places))] = values(step, numbers, texts)
        p = tilted(logps, found, alpha=alpha)
        for row, n in enumerate(open_):
            rng = np.random.default_rng([seed, step, *ids[n]])
            place = int(rng.choice(tokens.shape[1], p=p[row]))
            answers[n] = (*answers[n], int(tokens[row, place]))
    return answers
