"""Rationales: the model also learns to explain why one answer is better."""

import jax.numpy as jnp
from jaxtyping import Array

from jaxpref.errors import InputError
from jaxpref.objectives.bound_loss import Loss, bind
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.learned_noise import wrapping
from jaxpref.objectives.objective import Metrics, Objective, State

SCORE = "policy_rationale_logps"


def rationale(loss: Loss, *, gamma: float = 0.1) -> Objective:
    """The loss, plus the negative log-likelihood of a rationale.

        L(x, y_w, y_l) - gamma log pi(z | x, y_w, y_l)

    Records have a field `rationale`, the text z.  It follows a question that consists
    of the prompt, both answers, and a request to explain why the first one is better.
    It costs as much as a third answer, also under the reference.

    Metrics: `rationale/nll`, the mean negative log-likelihood per token of rationale.

    Args:
      loss: a pairwise loss, or a `functools.partial` that sets hyperparameters.
      gamma: weight of the log-likelihood, summed over tokens, >= 0; the default is that
        of the authors' configs.

    Raises:
      InputError: if an option is wrong, or the loss is one of rewards or reads more
        than sums over whole answers.

    References:
      Just et al., "Data-Centric Human Preference with Rationales for Direct Preference
      Alignment", 2024, arXiv:2407.14477.
      Authors' code: reds-lab/preference-learning-with-rationales, where the second term
      is -log s(gamma log pi(z)), which is nearly the same for long rationales.
    """
    if not gamma >= 0:
        raise InputError(f"rationale: gamma {gamma}: must be 0 or more")
    bound = bind(loss)
    refused = ("rewards", "prefix", "joint", "kls", "mismatched")
    if any(word in name for word in refused for name in bound.reads):
        raise InputError(
            f"rationale: {bound.name} reads {', '.join(bound.reads)}; use a loss of "
            "log-probabilities of whole answers, such as dpo"
        )

    def pair_losses(inputs: Inputs, state: State) -> Array:
        del state
        return bound(inputs) - jnp.float32(gamma) * inputs[SCORE]

    def learn(inputs: Inputs, state: State) -> tuple[State, Metrics]:
        nll = -inputs[SCORE] / inputs["rationale_lengths"]
        return state, {"rationale/nll": mean_over(nll, inputs.is_pair)}

    return wrapping(
        "rationale",
        bound,
        {"gamma": gamma},
        reads=(*bound.reads, SCORE, "rationale_lengths"),
        losses=pair_losses,
        learn=learn,
        couples=bound.reads if bound.couples_pairs else (),
    )
