"""Log-probabilities of sampled tokens under the policy and under the reference."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.data.batch import PreferenceBatch
from jaxpref.losses import kl_k3, sum_by_completion
from jaxpref.models.logprobs import REFERENCE
from jaxpref.runtime.mesh import batch_sharding
from jaxpref.scoring.score_dataset import make_score_step
from jaxpref.scoring.scorer import Frozen, Params
from jaxpref.sharding import replicated
from jaxpref.train.task import Task

TOKEN_LOGPS = "token_logps"
POLICY, SAMPLER = "policy", "sampler"
SAMPLER_LOGPS = f"{SAMPLER}_{TOKEN_LOGPS}"
REFERENCE_LOGPS = f"{REFERENCE}_{TOKEN_LOGPS}"

TokenLogps = Callable[[Params, PreferenceBatch], tuple[Any, dict[str, Any]]]
"""`(params, batch)` -> the log-probabilities of the answers, [A, R, S, K], whole on
every device, and those of the tokens, float32 [A, R, Q, P] by name."""


def make_token_logps(task: Task, frozen: Frozen) -> TokenLogps:
    """The function that scores the tokens of a batch.

    With the values of a value head and the reference's log-probabilities, if the
    objective reads them.
    """
    names = task.objective.token_numbers
    of_policy = {n: n.replace(SAMPLER, POLICY) for n in names if SAMPLER in n}
    of_reference: Callable | None = None
    if REFERENCE_LOGPS in task.objective.token_numbers:
        of_reference = _reference_logps(task, frozen)
    spec = batch_sharding(task.mesh).spec
    # The dtype and the layout that the train step is compiled for.
    cast = jax.jit(lambda x: jax.reshard(x.astype(jnp.float32), spec))

    def token_logps(
        params: Params, batch: PreferenceBatch
    ) -> tuple[Any, dict[str, Any]]:
        scores, _ = task.score_step(params, frozen, batch)
        found = {name: scores[own] for name, own in of_policy.items()}
        if of_reference is not None:
            found[REFERENCE_LOGPS] = of_reference(batch)
        return scores["policy_logps"], jax.tree.map(cast, found)

    return token_logps


def _reference_logps(task: Task, frozen: Frozen) -> Callable:
    """The function that gives the reference's log-probabilities of a batch's tokens."""
    assert task.reference is not None
    step = make_score_step(task.scorer.of_reference(frozenset({REFERENCE_LOGPS})))
    params = task.scorer.reference_params(task.reference.weights, frozen, None)
    return lambda batch: step(params, {}, batch)[0][f"policy_{TOKEN_LOGPS}"]


@jax.jit
def answer_kls(
    batch: PreferenceBatch, numbers: Mapping[str, Array]
) -> tuple[Float[Array, "A R S K"], Int[Array, "A R S"]]:
    """The estimate of KL(policy || reference) of each answer, in nats.

        sum over its tokens of ref/pi - 1 - log ref/pi

    And the pairs, as from a score step: both whole on every device.

    Args:
      batch: the answers.
      numbers: the log-probabilities of their tokens, from `make_token_logps`.
    """
    owners = jnp.asarray(batch.completions)
    ratios = numbers[SAMPLER_LOGPS] - numbers[REFERENCE_LOGPS]
    of_tokens = kl_k3(jnp.where(owners >= 0, ratios, 0))
    shape = batch.completion_lengths.shape
    found = sum_by_completion(of_tokens, owners, num_completions=shape[-2] * shape[-1])
    return replicated(jnp.reshape(found, shape)), replicated(
        jnp.asarray(batch.pair_index)
    )
