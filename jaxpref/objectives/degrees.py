"""SPO: a head also learns how much content an answer has lost."""

import dataclasses

from jaxtyping import Array

from jaxpref.errors import InputError
from jaxpref.objectives.bound_loss import Loss, bind
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.learned_noise import wrapping
from jaxpref.objectives.objective import Metrics, Objective, State
from jaxpref.scoring.scores import AnswerDegrees

SCORES = "chosen_degree_logps", "rejected_degree_logps"


def spo(loss: Loss, *, degrees: int = 4, gamma: float = 0.1) -> Objective:
    """SPO: a preference loss, and the classification of degraded answers.

        L(x, y_w, y_l) - gamma [log p(0 | x, y_w) + log p(k | x, y_l)]

    p is a linear head on the final hidden state of an answer's last token, which is
    trained with the policy.  k is the degree to which content was removed from the
    rejected answer, a number of each record (--columns degree=FIELD): from 1 to
    `degrees` - 1 for copies of the chosen answer without some of its key content, and
    -1 for any other answer, which is not classified.  The chosen answer is whole, with
    degree 0.  The paper removes keywords; the records here come with their degrees.

    Metrics: `spo/nll`, the mean of the second term without gamma.

    Args:
      loss: a pairwise loss, or a `functools.partial` that sets hyperparameters.
      degrees: number of degrees, the whole answer included, >= 2.
      gamma: weight of the classification, >= 0.

    Raises:
      InputError: if an option is wrong, or the loss is one of rewards.

    References:
      Li et al., "Self-supervised Preference Optimization: Enhance Your Language Model
      with Preference Degree Awareness", 2024, arXiv:2409.17791.  No code is published;
      the head and the default of gamma are ours.
    """
    if not (0 <= gamma < float("inf") and degrees >= 2):
        raise InputError(
            f"spo: gamma {gamma}, degrees {degrees}: gamma must be 0 or more and "
            "finite, degrees at least 2"
        )
    bound = bind(loss)
    if any("rewards" in name for name in bound.reads):
        raise InputError(
            f"spo: {bound.name} is a loss of reward models; use one of policies"
        )

    def nll(inputs: Inputs) -> Array:
        chosen, rejected = inputs.arrays(SCORES)
        return -(chosen + rejected)

    def learn(inputs: Inputs, state: State) -> tuple[State, Metrics]:
        return state, {"spo/nll": mean_over(nll(inputs), inputs.is_pair)}

    objective = wrapping(
        "spo",
        bound,
        {"degrees": degrees, "gamma": gamma},
        reads=(*bound.reads, *SCORES, "degree"),
        losses=lambda inputs, state: bound(inputs) + gamma * nll(inputs),
        learn=learn,
        couples=bound.reads if bound.couples_pairs else (),
    )
    own = objective.check

    def check(name: str, value: float) -> None:
        if name == "degree" and not (value == -1 or value in range(1, degrees)):
            raise ValueError(
                f"a degree is -1 or a whole number from 1 to {degrees - 1}; set "
                "--objective.degrees"
            )
        own(name, value)

    heads = AnswerDegrees(degrees)
    return dataclasses.replace(objective, check=check, heads=heads)
