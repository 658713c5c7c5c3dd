"""Distillation from the distributions of other models."""

import jax
from jaxtyping import Array

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.objective import Metrics, Objective, State
from jaxpref.objectives.rewards import reward_metrics
from jaxpref.scoring.scores import Statistic

TEACHERS = ("teacher", "reverse")
"""The models that it reads; see `scoring.frozen_models.Teachers`."""


def align_distil(
    *, scale: float = 10.0, floor: float = 1e-3, beta: float = 0.1
) -> Objective:
    """AlignDistil: distillation from a teacher that extrapolates DPO at each token.

        loss = mean_t beta / a_t KL(pi_t || softmax(z_t + a_t (z_t - z_reverse_t)))
        a_t  = scale sum_v |p_t(v) - p_reverse_t(v)| + floor

    over the tokens t of an answer.  z are the logits of a model trained by DPO
    (--teacher), and z_reverse those of one trained by DPO on the same pairs with
    swapped answers (--reverse; or `--reverse start`, the model before training).  All
    three have one architecture and one tokenizer.  Of a pair, only the chosen answer is
    read; records with a prompt and a completion, such as sampled answers, do as well.

    Metrics: `align_distil/weight`, the mean of a_t.

    Args:
      scale: weight of twice the total variation distance in a_t, >= 0; the authors use
        10 for given answers and 15 for sampled ones.
      floor: a_t where the two models agree, > 0.
      beta: the beta with which they were trained, > 0; it scales the loss.

    Raises:
      InputError: if an option is out of range.

    References:
      Zhang et al., "AlignDistil: Token-Level Language Model Alignment as Adaptive
      Policy Distillation", 2025, arXiv:2503.02832.
      Code: songmzhang/AlignDistil, aligndistil_offpolicy_trainer.py.
    """
    options = {"scale": scale, "floor": floor, "beta": beta}
    own = {"scale": scale, "floor": floor}

    def loss(z, t, others) -> Array:
        del t
        logits = (others[name] for name in TEACHERS)
        return losses.align_distil(z, *logits, **options)

    def weight(z, t, others) -> Array:
        del z, t
        return losses.align_distil_weights(*(others[name] for name in TEACHERS), **own)

    one = jax.ShapeDtypeStruct((2,), "float32")
    try:
        jax.eval_shape(loss, one, None, dict.fromkeys(TEACHERS, one))
    except ValueError as error:
        raise InputError(f"align_distil: {error}") from error
    per_token = lambda inputs, name: inputs[name] / inputs["chosen_lengths"]

    def learn(inputs: Inputs, state: State) -> tuple[State, Metrics]:
        weights = per_token(inputs, "chosen_distillation_weights")
        return state, {"align_distil/weight": mean_over(weights, inputs.is_pair)}

    return Objective(
        name="align_distil",
        options=options,
        reads=("chosen_distillation", "chosen_distillation_weights", "chosen_lengths"),
        losses=lambda inputs, state: per_token(inputs, "chosen_distillation"),
        metrics=reward_metrics((), {}, per_token=False),
        learn=learn,
        statistics=(
            Statistic("distillation", loss, TEACHERS),
            Statistic("distillation_weights", weight, TEACHERS),
        ),
    )
