"""Goal-conditioned reward models: hidden states that say where an answer leads."""

import dataclasses

from jaxtyping import Array

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.objectives.bound_loss import Loss, bind
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.learned_noise import wrapping
from jaxpref.objectives.objective import Metrics, Objective, State
from jaxpref.scoring.scores import OF_HEADS, GoalStates, scores_read

STATES = "chosen_source_states", "chosen_goal_states", "rejected_goal_states"


def goal_contrast(loss: Loss, *, beta: float = 0.5, samples: int = 16) -> Objective:
    """Goal-conditioned reward models, by a contrast of hidden states.

        L(x, y_w, y_l) + beta goal_contrast

    where `losses.goal_contrast` compares the final hidden states at tokens of the
    chosen answer with those at later tokens of it, which should be similar, and with
    those at tokens of the rejected answer, which should not.  Each step draws tokens of
    its own for each pair: two different ones of each answer, of which the later is the
    goal.  An answer of one token is source and goal itself.  Held-out losses are those
    of L alone.

    Metrics: `goal_contrast/loss`, the mean of the second term without beta.

    Args:
      loss: a pairwise loss of reward models, such as bradley_terry, or a
        `functools.partial` that sets hyperparameters.
      beta: weight of the contrast, >= 0.
      samples: draws of an earlier and a later token of each answer, >= 1.

    Raises:
      InputError: if an option is wrong, or the loss is none of reward models.

    References:
      Nath et al., "Learning Goal-Conditioned Representations for Language Reward
      Models", 2024, arXiv:2407.13887; the defaults are those of
      vaskarnathscale/goal-conditioned-rm, README.md.
    """
    if not (0 <= beta < float("inf") and samples >= 1):
        raise InputError(
            f"goal_contrast: beta {beta}, samples {samples}: beta must be 0 or more "
            "and finite, samples at least 1"
        )
    bound = bind(loss)
    if not scores_read(bound.reads) & OF_HEADS:
        raise InputError(
            f"goal_contrast: {bound.name} trains no reward model; use a loss of "
            "reward models, such as bradley_terry"
        )
    contrast = lambda inputs: losses.goal_contrast(*inputs.arrays(STATES))

    def values(inputs: Inputs, state: State) -> Array:
        del state
        return bound(inputs) + beta * contrast(inputs)

    def learn(inputs: Inputs, state: State) -> tuple[State, Metrics]:
        mean = mean_over(contrast(inputs), inputs.is_pair)
        return state, {"goal_contrast/loss": mean}

    objective = wrapping(
        "goal_contrast",
        bound,
        {"beta": beta, "samples": samples},
        reads=(*bound.reads, *STATES),
        losses=values,
        learn=learn,
        evaluate=lambda inputs, state: (bound(inputs), {}),
        couples=bound.reads if bound.couples_pairs else (),
    )
    return dataclasses.replace(objective, heads=GoalStates(samples))
