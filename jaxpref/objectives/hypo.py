"""HyPO: pairs of a dataset, and the KL divergence of sampled answers."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.objectives.inputs import Inputs, mean_over
from jaxpref.objectives.objective import Metrics, Objective, State, from_loss
from jaxpref.objectives.sampled import (
    POLICY,
    REFERENCE,
    SAMPLER,
    OfAnswers,
    answer_logps,
)

PAIR = 2
"""Completions of a prompt that are in the data; those after them are samples."""


def hypo(*, beta: float = 0.1, kl: float = 0.01) -> Objective:
    """Hybrid preference optimization: offline DPO, and the reverse KL on samples.

        L_dpo(x, y_w, y_l; beta) + kl KL(pi, ref | x)

    The pair is in --data.  The divergence is that of K answers y_i to its prompt that
    are sampled in training, with the gradient

        grad KL = 1/K sum_i w (l_i - mean over j != i of l_j) grad log pi(y_i)
        l = log pi_old(y)/ref(y),    w = pi / pi_old of the answer

    Its mean is exact with one update per sample.  DPO alone does not bound the
    divergence on answers that are in no pair.  No reward is read.

    Metrics: those of DPO; `kl`, an estimate of KL(pi_old || ref) of an answer in nats;
    `lengths`, mean tokens of a sampled answer.

    Args:
      beta: of DPO, > 0.
      kl: coefficient of the divergence, >= 0.

    Raises:
      InputError: if an option is out of range.

    References:
      Song et al., "The Importance of Online Data: Understanding Preference Fine-tuning
      via Coverage", 2024, arXiv:2406.01462, Algorithm 1; Ahmadian et al., "Back to
      Basics", 2024, arXiv:2402.14740, for the baseline.  The defaults are ours.
    """
    if not 0 < beta < float("inf"):
        raise InputError(f"hypo: beta {beta}: must be above 0 and finite")
    if not 0 <= kl < float("inf"):
        raise InputError(f"hypo: kl {kl}: must be 0 or more and finite")
    dpo = from_loss(losses.dpo, beta=beta)

    def of_pairs(inputs: Inputs) -> Inputs:
        logps = {
            "policy_logps": answer_logps(inputs, POLICY),
            "reference_logps": answer_logps(inputs, REFERENCE),
        }
        return Inputs(logps, inputs.batch)

    def group_losses(inputs: Inputs, state: State) -> Array:
        policy, sampler, reference = _of_samples(inputs).values()
        exist = _sampled(inputs) > 0
        # The answer with the larger ratio is to become less likely.
        advantages = losses.leave_one_out(reference - sampler, where=exist)
        divergence = losses.policy_gradient(policy, sampler, advantages)
        return dpo.losses(of_pairs(inputs), state) + kl * jnp.mean(divergence, -1)

    def metrics(inputs: Inputs) -> Metrics:
        _, sampler, reference = _of_samples(inputs).values()
        lengths = _sampled(inputs)
        exist = lengths > 0
        return dpo.metrics(of_pairs(inputs)) | {
            "kl": mean_over(losses.kl_k1(sampler - reference), exist),
            "lengths": mean_over(lengths * 1.0, exist),
        }

    return Objective(
        name="hypo",
        options={"beta": beta, "kl": kl},
        reads=(
            *("policy_chosen_logps", "policy_rejected_logps"),
            *(POLICY, SAMPLER, REFERENCE),
        ),
        losses=group_losses,
        metrics=metrics,
    )


def _of_samples(inputs: Inputs) -> Mapping[str, OfAnswers]:
    """Log-probabilities of the sampled answers, by POLICY, SAMPLER, and REFERENCE."""
    names = POLICY, SAMPLER, REFERENCE
    return {name: answer_logps(inputs, name)[..., PAIR:] for name in names}


def _sampled(inputs: Inputs) -> Array:
    """The tokens of each sampled answer; 0 for none."""
    return jnp.asarray(inputs.batch.completion_lengths)[..., PAIR:]
