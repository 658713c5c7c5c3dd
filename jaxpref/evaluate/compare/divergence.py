"""KL divergences of models from the one before training, from their own answers."""

from collections.abc import Sequence

import numpy as np

from jaxpref.data.records import Example
from jaxpref.errors import InputError
from jaxpref.evaluate.compare.answers import Answer, Key, ModelAnswers
from jaxpref.models.weights import is_reward
from jaxpref.rewards import Answered, ModelOptions
from jaxpref.rewards.answered import assistant_turn
from jaxpref.rewards.models import score
from jaxpref.scoring.run_weights import named_weights


def divergences(
    models: Sequence[ModelAnswers],
    keys: Sequence[Key],
    reference: str | None,
    options: ModelOptions,
) -> dict[str, float | None]:
    """KL(model || reference) of each model, in nats per answer.

        mean over its own answers of  log p_model(y | x) - log p_reference(y | x)

    Answers that were cut off have no end, and are left out.  This is the divergence if
    the answers were sampled at temperature 1.

    Args:
      models: the answers, with their log-probabilities under the model in `logp`.
      keys: which of them.
      reference: the language model before training; None to read `reference_logp` of
        the answers.
      options: how the reference computes log-probabilities.

    Returns:
      By name; None if a log-probability of one of the models is not known.

    Raises:
      InputError: if the reference is a reward model.
    """
    found: dict[str, float | None] = {}
    for one in models:
        answers = [one.answers[key] for key in keys if one.answers[key].ended]
        own = _known([x.logp for x in answers])
        before = None
        if reference is None:
            before = _known([x.reference_logp for x in answers])
        elif own is not None:
            before = _reference_logps(answers, reference, options)
        found[one.name] = None
        if own is not None and before is not None:
            ratios = (own - before)[np.isfinite(before)]
            found[one.name] = float(ratios.mean()) if len(ratios) else None
    return found


def _reference_logps(
    answers: Sequence[Answer], reference: str, options: ModelOptions
) -> np.ndarray | None:
    weights = named_weights(reference, None)
    if is_reward(weights):
        raise InputError(
            f"--reference {reference}: is a reward model; name the language model "
            "before training"
        )
    asked = []
    for one in answers:
        if one.prompt is None:
            return None
        is_text = isinstance(one.prompt, str)
        completion = one.text if is_text else assistant_turn(one.text)
        example = Example(one.prompt, (completion,))
        asked.append(Answered(example, {}, one.place, as_user=one.as_user))
    title = f"log-probs under {reference}"
    found = score(weights, "policy_logps", asked, options, title, allow_cut=False)
    return np.concatenate(found)


def _known(values: Sequence[float | None]) -> np.ndarray | None:
    """The values; None if one of them is not known, or there are none."""
    if not values or None in values:
        return None
    return np.array(values, np.float64)
