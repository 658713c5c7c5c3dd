"""Objectives of single answers that are labeled desirable or undesirable."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.objectives.bound_loss import check_options
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.objective import Metrics, Objective, State

READS = ("policy_logps", "reference_logps", "desirable")
MISMATCHED = ("policy_mismatched_logps", "reference_mismatched_logps")


def kto(
    *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Objective:
    """Kahneman-Tversky optimization (KTO) of single answers labeled good or bad.

        loss = w_D (1 - s(beta (a - z)))  if desirable
               w_U (1 - s(beta (z - a)))  if not,    a = log pi(y|x)/ref(y|x)
        z    = max(0, mean of log pi(y'|x)/ref(y'|x))

    Records have a prompt, a completion, and a label that is true or false.  The
    reference point z is the mean over the global batch, and no gradient flows through
    it.  y' is the answer to another prompt: each record is given that of one other
    record for the whole run, so that its score under the reference is computed once.
    It costs as much as a second answer.

    Metrics: those of the rewards beta a of both classes; `rewards/accuracies`, the
    share of the answers with a > z if desirable and a < z if not; and `kl`, z.

    Args:
      beta: steepness, > 0.
      desirable_weight: w_D, >= 0.
      undesirable_weight: w_U, >= 0.  The authors recommend weights for which
        w_D n_D / (w_U n_U) is from 1 to 4/3, where n are the numbers of answers.

    Raises:
      InputError: if an option is out of range.

    References:
      Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization",
      2024, arXiv:2402.01306, Eq. 7 and section 4.1.
    """
    weights = {
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
    }
    options = {"beta": beta, **weights}
    check_options(losses.kto, options, "kl")

    def kl(inputs: Inputs) -> Array:
        mismatched = inputs.arrays(MISMATCHED)
        return losses.kto_kl(*mismatched, where=inputs.is_pair)

    def answer_losses(inputs: Inputs, state: State) -> Array:
        return losses.kto(*_answers(inputs), kl(inputs), **options)

    def metrics(inputs: Inputs) -> Metrics:
        z = kl(inputs)
        return reward_metrics(inputs, beta=beta, threshold=beta * z) | {"kl": z}

    return Objective(
        name="kto",
        options=options,
        reads=(*READS, *MISMATCHED),
        losses=answer_losses,
        metrics=metrics,
        couples=MISMATCHED,
    )


def apo_zero_unpaired(*, beta: float = 0.1) -> Objective:
    """Anchored preference optimization of single answers: KTO with reference point 0.

        loss = 1 - s(beta a) if desirable, s(beta a) if not,    a = log pi(y|x)/ref(y|x)

    Records have a prompt, a completion, and a label that is true or false.

    Metrics: those of the rewards beta a of both classes; `rewards/accuracies`, the
    share of the answers with a > 0 if desirable and a < 0 if not.

    Args:
      beta: steepness, > 0.

    Raises:
      InputError: if an option is out of range.

    References:
      D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions:
      Addressing Underspecification in Alignment", 2024, arXiv:2408.06266, Eq. 7.
    """
    options = {"beta": beta}
    check_options(losses.apo_zero_unpaired, options)
    return Objective(
        name="apo_zero_unpaired",
        options=options,
        reads=READS,
        losses=lambda inputs, state: losses.apo_zero_unpaired(
            *_answers(inputs), **options
        ),
        metrics=lambda inputs: reward_metrics(inputs, beta=beta, threshold=0.0),
    )


def bco(*, beta: float = 0.01, momentum: float = 0.9, udm: bool = False) -> Objective:
    """Binary classifier optimization (BCO) of single answers labeled good or bad.

        loss = -log s(r - d) if desirable, -log s(d - r) if not,    r = beta log pi/ref

    Records have a prompt, a completion, and a label that is true or false.  The shift d
    is the moving average of `losses.bco_shift`, which is midway between the mean
    rewards of both classes of the global batch, with that of this batch; no gradient
    flows through it.  A batch of one class does not change it.  Evaluation uses the
    moving average of the training batches.

    If the prompts of both classes differ, the authors weight undesirable answers by
    underlying distribution matching (`udm`): the loss of one with prompt x is
    multiplied by p(x | desirable) / p(x | undesirable), from 0.5 to 10
    (`losses.udm_weights`).  The ratio comes from a logistic regression on the mean of
    the final hidden states of x in the model before training, fitted to other prompts.
    It multiplies any --columns weight.

    Metrics: those of the rewards r of both classes; `rewards/accuracies`, the share of
    the answers with r > d if desirable and r < d if not; and `bco/shift`, d.

    Args:
      beta: inverse temperature of the KL penalty, > 0.
      momentum: weight of the previous average of d, in [0, 1).
      udm: whether to weight undesirable answers by their prompts.

    Raises:
      InputError: if an option is out of range.

    References:
      Jung et al., "Binary Classifier Optimization for Large Language Model Alignment",
      2024, arXiv:2404.04656.
    """
    if not 0 <= momentum < 1:
        raise InputError(f"loss bco: momentum {momentum}: must be in [0, 1)")
    options = {"beta": beta}
    check_options(losses.bco, options, "running_shift")

    def init(num_annotators: int) -> State:
        del num_annotators
        # The average starts at 0; `weight` corrects for it.
        return {name: jnp.zeros((), jnp.float32) for name in ("shift", "weight")}

    def moved(inputs: Inputs, state: State) -> State:
        inputs, liked = inputs.constant(), desirable(inputs)
        new = losses.bco_shift(_rewards(inputs, beta), liked, where=inputs.is_pair)
        has = lambda chosen: jnp.any(inputs.is_pair & chosen)
        keep = jnp.where(has(liked) & has(~liked), momentum, 1.0)
        return {
            "shift": keep * state["shift"] + (1 - keep) * new,
            "weight": keep * state["weight"] + (1 - keep),
        }

    def shift_of(state: State) -> Array:
        return state["shift"] / jnp.maximum(state["weight"], 1e-12)

    def losses_at(shift: Array, inputs: Inputs) -> Array:
        return losses.bco(*_answers(inputs), shift, **options)

    def learn(inputs: Inputs, state: State) -> tuple[State, Metrics]:
        following = moved(inputs, state)
        return following, metrics(inputs, shift_of(following))

    def evaluate(inputs: Inputs, state: State) -> tuple[Array, Metrics]:
        shift = shift_of(state)
        return losses_at(shift, inputs), metrics(inputs, shift)

    def metrics(inputs: Inputs, shift: Array) -> Metrics:
        found = reward_metrics(inputs, beta=beta, threshold=shift)
        return found | {"bco/shift": shift}

    return Objective(
        name="bco",
        options=options | {"momentum": momentum, "udm": udm},
        matches_prompts=udm,
        reads=READS,
        losses=lambda inputs, state: losses_at(shift_of(moved(inputs, state)), inputs),
        metrics=lambda inputs: {},  # they depend on the shift, which `learn` knows
        init=init,
        learn=learn,
        evaluate=evaluate,
        couples=READS[:2],
    )


def desirable(inputs: Inputs) -> Bool[Array, "*batch S"]:
    """Whether each answer is labeled desirable; False in empty slots."""
    return inputs["desirable"] > 0.5


def reward_metrics(inputs: Inputs, *, beta: float, threshold: Any) -> Metrics:
    """Means of log-probabilities and implicit rewards over the answers of each class.

    Args:
      inputs: the scores of a batch, and the batch.
      beta: scale of the rewards.
      threshold: the reward above which an answer counts as desirable; ties count half.
    """
    rewards, liked = _rewards(inputs, beta), desirable(inputs)
    logps = inputs.completions("policy_logps")[..., 0]
    classes: Mapping[str, Array] = {
        "desirable": inputs.is_pair & liked,
        "undesirable": inputs.is_pair & ~liked,
    }
    of = lambda values: [mean_over(values, where) for where in classes.values()]
    good, bad = of(rewards)
    signs = jnp.where(liked, 1.0, -1.0) * jnp.sign(rewards - threshold)
    return {
        **{f"logps/{name}": mean for name, mean in zip(classes, of(logps))},
        "rewards/desirable": good,
        "rewards/undesirable": bad,
        "rewards/margins": good - bad,
        "rewards/accuracies": mean_over((1 + signs) / 2, inputs.is_pair),
    }


def _answers(inputs: Inputs) -> tuple[Array, Array, Array]:
    """The log-probs of each answer under policy and reference, and its label."""
    policy, reference = map(inputs.completions, READS[:2])
    return policy[..., 0], reference[..., 0], desirable(inputs)


def _rewards(inputs: Inputs, beta: float) -> Array:
    """The implicit reward beta log pi/ref of each answer, [..., S]."""
    policy, reference, _ = _answers(inputs)
    return losses.implicit_rewards(policy, reference, beta=beta)
