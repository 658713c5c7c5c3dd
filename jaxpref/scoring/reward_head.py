"""The head of the reward model that a run trains."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpref.data.columns import rated
from jaxpref.errors import InputError
from jaxpref.models.reward_head import Head, HeadOptions
from jaxpref.models.weights import Weights, is_reward
from jaxpref.models.weights import head_of as head_of_weights
from jaxpref.scoring.scores import OF_HEADS, scores_read

EMBEDDING = 6
"""Length of an embedding, by default."""


def head_of(
    reads: Sequence[str],
    hyperparameters: Mapping[str, Any],
    options: HeadOptions,
    weights: Weights | None = None,
) -> Head | None:
    """The head that an objective trains; None if it trains a language model.

    Args:
      reads: the names of what the objective reads.
      hyperparameters: its hyperparameters; those of a loss that it wraps are in "loss".
      options: the options of the user.
      weights: the initial model, and maybe an adapter.  If they are a reward model, its
        own head is trained on.

    Raises:
      InputError: if an option does not fit the objective or the initial model.
    """
    (score,) = scores_read(reads) & OF_HEADS or {None}
    if score is None:
        for name, value in vars(options).items():
            if value is not None:
                raise InputError(
                    f"--head.{name} {value}: trains no reward model; leave it out, or "
                    "choose a loss of reward models, such as bradley_terry"
                )
        return None
    if score != "embeddings" and options.size is not None:
        raise InputError(
            f"--head.size {options.size}: only the embeddings of general_preference "
            "have a size; leave it out"
        )
    start = None
    name = "" if weights is None else str(weights.adapter or weights.folder)
    if weights is not None and is_reward(weights):
        start = head_of_weights(weights)
        if options.kind not in (None, start.layers):
            raise InputError(
                f"--head.kind {options.kind}: the head of {name} is {start.layers}, "
                "and is trained on; leave it out, or start from a language model"
            )
    layers = options.kind or (start.layers if start else "linear")
    if score == "embeddings":
        tau = {**hyperparameters.get("loss", {}), **hyperparameters}.get("tau", 1.0)
        default = (start.embedding if start else 0) or EMBEDDING
        temperature = float(tau) if isinstance(tau, int | float) else 1.0
        size = options.size or default
        wanted = Head(layers, embedding=size, temperature=temperature)
    else:
        wanted = Head(layers, rated(reads))
    if start is not None:
        _check_start(wanted, start, name)
    return wanted


def _check_start(wanted: Head, start: Head, folder: str) -> None:
    """Checks that an initial reward model says what is to be trained.

    A rating of one attribute may become a reward, as in the recipe of
    HelpSteer2-Preference, arXiv:2410.01257, and a reward a rating.
    """
    embeds = wanted.embedding == start.embedding
    same = wanted.attributes == start.attributes or wanted.size == start.size == 1
    if not (embeds and (wanted.embedding or same)):
        raise InputError(
            f"{folder}: is a reward model with {describe(start)}, but this run trains "
            f"{describe(wanted)}; start from a language model, or from a reward model "
            "with the same head"
        )


def describe(head: Head) -> str:
    """What a head gives, for messages."""
    if head.embedding:
        return f"an embedding of {head.embedding} numbers"
    if head.attributes:
        return f"ratings of {', '.join(head.attributes)}"
    return "one reward"
