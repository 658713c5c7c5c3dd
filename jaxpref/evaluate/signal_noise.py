"""How well a benchmark tells models apart, given how its scores vary in training."""

from collections.abc import Mapping, Sequence

import numpy as np


def signal_and_noise(scores: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """Signal, noise and their ratio, from scores of the last checkpoints of models.

        signal = max_jk |m_j - m_k| / mean(m),    m the last score of each model
        noise  = mean over models of  sd(scores) / mean(scores)

    A difference between two models that is much smaller than the noise says nothing
    about them.  The mean over a model's last checkpoints has less noise than any one.

    Args:
      scores: of each model, the score at its last checkpoints, in order of their steps.

    Returns:
      `signal`, None for a single model; `noise`, None if no model has two checkpoints;
      and `signal_to_noise`, None if one of them is None or the noise is 0.

    Raises:
      ValueError: if there is no score.

    References:
      Heineman et al., "Signal and Noise", 2025, arXiv:2508.13144, section 3.
    """
    models = [np.asarray(x, np.float64) for x in scores.values()]
    if not models or not all(map(len, models)):
        raise ValueError("Expected at least one score of each model.")
    last = np.array([x[-1] for x in models])
    several = [x for x in models if len(x) > 1]
    signal = noise = ratio = None
    if len(last) > 1:
        signal = float((last.max() - last.min()) / last.mean())
    if several:
        noise = float(np.mean([x.std() / x.mean() for x in several]))
    if signal is not None and noise:
        ratio = signal / noise
    return {"signal": signal, "noise": noise, "signal_to_noise": ratio}
