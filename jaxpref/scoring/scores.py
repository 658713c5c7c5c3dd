"""What a model says of a batch: the arrays that losses are fed with, by name.

A loss reads `policy_chosen_logps`; a model scores all completions at once.  So arrays
are kept by the loss's name without its side (`policy_logps`), with an axis of sides.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref import losses
from jaxpref.data.batch import PARTS, PreferenceBatch
from jaxpref.data.labels import LABELS
from jaxpref.models import Model, RewardModel, logprobs
from jaxpref.models.layout import SPECS, on_mesh

Scores = dict[str, jax.Array]
"""Name without its side -> float32 or wider `[..., R, S, K]`."""
ScoreFunction = Callable[..., Scores]
"""`(params, batch without its A axis, reference=None) -> Scores`."""

PROVIDED = {
    "policy_logps": "log-probs summed over a completion's tokens",
    "policy_prefix_logps": "the same over its first min(|y_w|, |y_l|) tokens",
    "log_weights": "mean over its tokens of log pi(y_t) - log sum_v pi(v)^2",
    "kls": "KL(ref || pi) summed over its positions; keeps the reference's weights",
    "reference_logps": "as for the policy, under the reference",
    "reference_prefix_logps": "as for the policy, under the reference",
    "rewards": "a reward model's score at its last token; not beside log-probs",
    "lengths": "its tokens",
}
"""What a loss may ask for, and what it is of each completion."""
OF_THE_MODEL = {name for name in PROVIDED if not name.startswith(("ref", "lengths"))}
"""Those that change with the model that is trained."""


def without_side(name: str) -> str:
    """`policy_chosen_logps` -> `policy_logps`."""
    return name.replace("chosen_", "").replace("rejected_", "")


def make_scores(
    model: Model | RewardModel,
    needs: frozenset[str] = frozenset({"policy_logps"}),
    *,
    chunk_size: int | None = None,
) -> ScoreFunction:
    """Scores of the rows of a batch under a model.

    The backbone runs on every token, the LM head on completion tokens only,
    `chunk_size` of them at a time; what needs whole distributions is summed up chunk by
    chunk too.  Rewards need no LM head.

    Args:
      model: the functional model, for rewards a reward model; a reference has the same
        sizes.
      needs: names out of `PROVIDED` that are wanted beside `policy_logps`, or `rewards`
        in their place.
      chunk_size: completion tokens of a sequence whose logits exist at the same time;
        by default `logprobs.default_chunk`.

    Returns:
      A pure function from parameters, `[R, ...]` batch fields and, where `kls` are
      needed, the reference's parameters, to `[R, S, K]` scores.
    """

    def scores(params, batch: PreferenceBatch, reference=None) -> Scores:
        rows, sequences, _ = batch.tokens.shape
        _, slots, sides = batch.completion_lengths.shape
        flat = lambda x: x.reshape(rows * sequences, *x.shape[2:])

        def per_completion(sum_tokens, of_token, owners=batch.completions):
            of_token = jnp.reshape(
                of_token, batch.targets.shape, out_sharding=on_mesh(SPECS.hidden)
            )
            sums = sum_tokens(of_token, owners, num_completions=slots * sides)
            return jnp.reshape(
                sums, (rows, slots, sides), out_sharding=on_mesh(SPECS.hidden)
            )

        positions = segments = None
        if batch.segments is not None:
            positions, segments = flat(batch.positions), flat(batch.segments)
            segments = segments // PARTS, segments % PARTS
        if "rewards" in needs:
            if segments is not None:
                ends = last_places(segments, slots=slots, sides=sides)
                rewards = model.rewards_at(
                    params, flat(batch.tokens), ends, positions, segments
                )
                rewards = jnp.where(ends >= 0, rewards, 0)
                return {
                    "rewards": jnp.reshape(
                        rewards,
                        (rows, slots, sides),
                        out_sharding=on_mesh(SPECS.hidden),
                    )
                }
            # A token's own state is one place behind the one that predicts it.
            at = flat(batch.predictors) + 1
            rewards = model.rewards_at(params, flat(batch.tokens), at)
            ends = last_tokens(batch.completions)
            return {"rewards": per_completion(losses.sum_by_completion, rewards, ends)}

        read = lambda p: model.hidden_and_heads(
            p, flat(batch.tokens), positions, segments
        )
        asked = (flat(batch.predictors), flat(batch.targets))
        of_tokens = {}
        if "kls" in needs:
            # The reference is a constant, whoever asks for a gradient.
            fixed = jax.lax.stop_gradient(read(reference))
            logps, reference_logps, kls = logprobs.token_logps_and_kls(
                *read(params), *fixed, *asked, chunk_size=chunk_size
            )
            of_tokens = {"reference_logps": reference_logps, "kls": kls}
        elif "log_weights" in needs:
            logps, collisions = logprobs.token_logps_and_collisions(
                *read(params), *asked, chunk_size=chunk_size
            )
            of_tokens = {"log_weights": logps - collisions}
        else:
            logps = logprobs.token_logps(*read(params), *asked, chunk_size=chunk_size)
        of_tokens["policy_logps"] = logps
        sums = {
            name: per_completion(losses.sum_by_completion, of_token)
            for name, of_token in of_tokens.items()
        }
        if "policy_prefix_logps" in needs:
            # What the longer answer has beyond the shorter one is the tail.
            shorter = jnp.min(batch.completion_lengths, axis=-1, keepdims=True)
            prefix_lengths = jnp.broadcast_to(shorter, batch.completion_lengths.shape)
            prefix_lengths = jnp.reshape(
                prefix_lengths,
                (rows, slots * sides),
                out_sharding=on_mesh(SPECS.tokens),
            )
            sums["policy_prefix_logps"] = per_completion(
                functools.partial(
                    losses.sum_prefix_by_completion, prefix_lengths=prefix_lengths
                ),
                logps,
            )
        if "log_weights" in needs:
            sums["log_weights"] /= jnp.maximum(batch.completion_lengths, 1)
        return sums

    return scores


def last_places(segments, *, slots: int, sides: int) -> jax.Array:
    """Where each completion of packed rows ends, int [B, slots * sides]; -1 if unused.

    Args:
      segments: `(pairs, parts)`, each int [B, T]; a pair's number is its slot.
      slots: S.
      sides: K.
    """
    owner = jnp.arange(slots * sides)
    of_slot, part = owner // sides, owner % sides + 1
    pairs, parts = (x[..., None] for x in segments)
    place = jnp.arange(pairs.shape[1])[:, None]
    own = (pairs == of_slot) & (parts == part)
    return jnp.max(jnp.where(own, place, -1), axis=1)


def last_tokens(owners: jax.Array) -> jax.Array:
    """Owners [..., P] of target tokens, -1 but for the last token of each completion.

    A completion's tokens stand side by side in one sequence.
    """
    padding = [(0, 0)] * (owners.ndim - 1) + [(0, 1)]
    following = jnp.pad(owners[..., 1:], padding, constant_values=-1)
    return jnp.where(owners == following, -1, owners)


def pair_arrays(
    reads: tuple[str, ...], scores: Scores, batch: PreferenceBatch, state: Any
) -> dict[str, jax.Array]:
    """The arrays that a loss reads, each `[..., S]`; running statistics are scalars.

    `reliabilities` are those of the pairs' annotators, out of the state; the last is
    the one of all annotators that are not known.  `LABELS` come with the pairs.

    Empty slots hold log-probs 0 and lengths 1, so that no loss divides by zero there.
    """
    sides = {"chosen": 0, "rejected": 1}
    lengths = jnp.maximum(batch.completion_lengths, 1).astype(jnp.float32)
    available = {"lengths": lengths} | dict(batch.reference) | scores

    def find(name: str) -> jax.Array:
        if name.startswith("running_"):
            return state[name]
        if name == "reliabilities":
            return of_annotators(state["reliability"], batch.annotators)
        if name in LABELS:
            return batch.labels[name]
        (side,) = (k for word, k in sides.items() if word in name.split("_"))
        return available[without_side(name)][..., side]

    return {name: find(name) for name in reads}


def of_annotators(values: jax.Array, annotators: jax.Array) -> jax.Array:
    """Each pair's annotator's value; the last one's where it is not known (-1).

    By comparison and not by a gather, so pairs may lie on any device.
    """
    index = jnp.where(annotators < 0, len(values) - 1, annotators)
    own = index[..., None] == jnp.arange(len(values))
    return jnp.sum(jnp.where(own, values, 0), axis=-1)
