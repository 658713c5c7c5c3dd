"""The scores of completions, by name.

A loss reads `policy_chosen_logps`, but a model scores all completions at once.  A score
is therefore named without a side (`policy_logps`) and has an axis of completions.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxpref import losses
from jaxpref.data.batch import PreferenceBatch
from jaxpref.models.attention import Segments
from jaxpref.models.layout import SPECS, on_mesh
from jaxpref.models.logprobs import REFERENCE
from jaxpref.models.logprobs import Statistic as Statistic

Scores = dict[str, Array]
"""Name without its side -> float32 or wider [..., R, S, K].  One score has a number
for each token, [..., R, Q, P]."""


class Scored(NamedTuple):
    """What a scorer says of a micro-batch; of twins, each part by model."""

    scores: dict[str, Any]
    """`Scores`: numbers of each completion."""
    totals: dict[str, Any]
    """Names from `TOTALS`: what the model itself computed, summed over the tokens of
    the micro-batch, so that sums over micro-batches are those of the batch."""


ROUTER = "router"
TOTALS = {ROUTER: "RouterSums of a mixture of experts"}
"""The totals that a scorer can compute, by name."""

SIDES = {"chosen": 0, "rejected": 1, "mismatched": 1, "rationale": 2}
"""Completions of a prompt, by the word that names them."""

DESCRIPTIONS = {
    "policy_logps": "log-probability summed over a completion's tokens",
    "policy_prefix_logps": "the same over its first min(|y_w|, |y_l|) tokens",
    "log_weights": "mean over its tokens of log pi(y_t) - log sum_v pi(v)^2",
    "kls": "KL(ref || pi) summed over its positions; needs the reference's weights",
    "reference_logps": "as for the policy, under the reference",
    "reference_prefix_logps": "as for the policy, under the reference",
    "rewards": "a reward model's score at its last token; excludes log-probabilities",
    "embeddings": "a vector of unit length at its last token, as the rewards",
    "attributes": "predicted ratings at its last token, as the rewards",
    "lengths": "its number of tokens",
    "policy_token_logps": "log-probability of each target token, [..., R, Q, P]",
    "sampler_token_logps": "the same under the parameters that sampled it",
    "reference_token_logps": "the same under the reference",
    "policy_token_values": "value of what precedes each target token, [..., R, Q, P]",
    "sampler_token_values": "the same under the parameters that sampled it",
}
"""The scores that a loss may read for each completion."""

OF_SAMPLED_TOKENS = frozenset(
    {"sampler_token_logps", "reference_token_logps", "sampler_token_values"}
)
"""Those that are computed once answers are sampled; see `token_numbers` of a batch."""

OF_HEADS = frozenset({"rewards", "embeddings", "attributes"})
"""Those that the head of a reward model gives.  Embeddings and attributes are vectors,
[..., R, S, K, N]."""


def score_and_side(name: str) -> tuple[str, int | None]:
    """`policy_rejected_logps` -> ("policy_logps", 1); side None if there is none.

    `policy_rejected_joint_logps` is the same score, of data whose prompts are trained
    on too; see `Kind.joint`.
    """
    words = [word for word in name.split("_") if word != "joint"]
    for side, index in SIDES.items():
        if side in words:
            words.remove(side)
            return "_".join(words), index
    return name, None


def scores_read(names: Iterable[str]) -> frozenset[str]:
    """The scores among the names that a loss reads, without their sides."""
    scores = (score_and_side(name)[0] for name in names)
    return frozenset(name for name in scores if name in DESCRIPTIONS)


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """A score computed from statistics of a completion's tokens."""

    statistics: tuple[str, ...]
    """Names from `models.logprobs.STATISTICS`."""
    combine: Callable[..., Float[Array, "R *shape"]]
    """`combine(batch, *statistics [R Q, P]) -> [R, S, K]`, or [R, Q, P] of tokens."""


def completion_sums(
    batch: PreferenceBatch, of_token: Float[Array, "rows P"], **options: Any
) -> Float[Array, "R S K"]:
    """Sums over each completion's tokens, or its first `prefix_lengths` [R, S K]."""
    rows, slots, sides = batch.completion_lengths.shape
    of_token = token_values(batch, of_token)
    add = losses.sum_prefix_by_completion if options else losses.sum_by_completion
    owners = cast(Array, batch.completions)
    sums = add(of_token, owners, num_completions=slots * sides, **options)
    return jnp.reshape(sums, (rows, slots, sides), out_sharding=on_mesh(SPECS.hidden))


def token_values(
    batch: PreferenceBatch, of_token: Float[Array, "rows P"]
) -> Float[Array, "R Q P"]:
    """A number of each target token, in the shape of the targets."""
    return jnp.reshape(
        of_token, batch.targets.shape, out_sharding=on_mesh(SPECS.hidden)
    )


def prefix_sums(
    batch: PreferenceBatch, of_token: Float[Array, "rows P"]
) -> Float[Array, "R S K"]:
    """Sums over as many tokens as the shorter completion of the pair has."""
    rows, slots, sides = batch.completion_lengths.shape
    shorter = jnp.min(batch.completion_lengths, axis=-1, keepdims=True)
    prefix_lengths = jnp.reshape(
        jnp.broadcast_to(shorter, batch.completion_lengths.shape),
        (rows, slots * sides),
        out_sharding=on_mesh(SPECS.tokens),
    )
    return completion_sums(batch, of_token, prefix_lengths=prefix_lengths)


def _log_weights(batch: PreferenceBatch, logps, collisions) -> Float[Array, "R S K"]:
    sums = completion_sums(batch, logps - collisions)
    return sums / jnp.maximum(batch.completion_lengths, 1)


TOKEN_SCORES: Mapping[str, TokenScore] = {
    "policy_logps": TokenScore(("logps",), completion_sums),
    "policy_prefix_logps": TokenScore(("logps",), prefix_sums),
    "policy_token_logps": TokenScore(("logps",), token_values),
    "log_weights": TokenScore(("logps", "collisions"), _log_weights),
    "kls": TokenScore(("kls",), completion_sums),
    "reference_logps": TokenScore(("reference_logps",), completion_sums),
    "reference_prefix_logps": TokenScore(("reference_logps",), prefix_sums),
}
"""The scores of a language model, each independent of the others."""


def _masked_sums(batch: PreferenceBatch, values, masks) -> Float[Array, "R S K"]:
    # Both are finite, also at unused positions, which the sum leaves out.
    return completion_sums(batch, values * masks)


MASK_SCORES: Mapping[str, TokenScore] = {
    "masked_log_ratios": TokenScore(
        ("logps", "reference_logps", "reward_masks"),
        lambda batch, logps, reference, masks: _masked_sums(
            batch, logps - reference, masks
        ),
    ),
    "masked_kls": TokenScore(("kls", "kl_masks"), _masked_sums),
    "reward_mask_sums": TokenScore(("reward_masks",), completion_sums),
    "kl_mask_sums": TokenScore(("kl_masks",), completion_sums),
    "unmasked": TokenScore(
        ("reward_masks",),
        lambda batch, masks: completion_sums(batch, (masks > 0) * 1.0),
    ),
}
"""Scores of a language model with masks (`token_masks`): sums of log-ratios and of
divergences under masks, sums of both masks, and tokens whose reward has a weight."""


@dataclasses.dataclass(frozen=True)
class TokenMasks:
    """Asks a scorer for `MASK_SCORES`; see `token_masks`."""

    learned: int
    """Masks that are trained: 2, 1 for a common one of rewards and divergences, or 0
    for one from the reference's activations."""

    @property
    def scores(self) -> frozenset[str]:
        """The scores that it adds."""
        return frozenset(MASK_SCORES)


@dataclasses.dataclass(frozen=True)
class AnswerDegrees:
    """Asks a scorer for the log-probability of each answer's degree; see `degrees`."""

    count: int
    """Number of degrees, the classes of a trained head."""

    @property
    def scores(self) -> frozenset[str]:
        """The scores that it adds."""
        return frozenset({"degree_logps"})


@dataclasses.dataclass(frozen=True)
class TokenValues:
    """Asks a scorer for the value of what precedes each token; see `values`."""

    @property
    def scores(self) -> frozenset[str]:
        """The scores that it adds."""
        return frozenset({"policy_token_values"})


@dataclasses.dataclass(frozen=True)
class HeadInputs:
    """Asks the scorer of a reward model for what the last layer of its head multiplies.

    With the gradients of the losses in the rewards, it gives those in the layer.
    """

    @property
    def scores(self) -> frozenset[str]:
        """The scores that it adds."""
        return frozenset({"head_inputs"})


@dataclasses.dataclass(frozen=True)
class GoalStates:
    """Asks the scorer of a reward model for states at random tokens of each answer."""

    count: int
    """N, draws of an earlier and a later token."""

    @property
    def scores(self) -> frozenset[str]:
        """The scores that it adds; see `goal_states`."""
        return frozenset({"source_states", "goal_states"})


OfStates = HeadInputs | GoalStates | None
"""What an objective may ask of the scorer of a reward model.  These scores are vectors,
too large to be stored, and are computed in train steps only."""

NEED_REFERENCE_WEIGHTS = frozenset({"kls"})
"""Scores that need the reference's full distributions, which cannot be stored."""


def models_read(
    scores: Collection[str], statistics: Collection[Statistic] = ()
) -> frozenset[str]:
    """The frozen models whose weights are read in every step, by name.

    Args:
      scores: the scores that are computed.
      statistics: those that an objective defines.
    """
    reads = {model for statistic in statistics for model in statistic.models}
    if NEED_REFERENCE_WEIGHTS & set(scores):
        reads.add(REFERENCE)
    return frozenset(reads)


def computed_scores(scores: frozenset[str]) -> frozenset[str]:
    """The scores among `scores` that a language model computes in every step.

    Scores of the reference are computed once, before training, unless its weights are
    needed in the step anyway.
    """
    live = bool(scores & NEED_REFERENCE_WEIGHTS)
    own = frozenset(n for n in scores if live or not n.startswith("reference_"))
    # Log-probabilities are logged even if the loss does not read them.
    return frozenset(own & TOKEN_SCORES.keys()) | {"policy_logps"}


def stored_scores(scores: frozenset[str]) -> frozenset[str]:
    """The reference's scores that are computed once, before training."""
    if scores & NEED_REFERENCE_WEIGHTS:
        return frozenset()
    names = scores - OF_SAMPLED_TOKENS
    return frozenset(name for name in names if name.startswith("reference_"))


def policy_name(name: str) -> str:
    """`reference_logps` -> `policy_logps`: the same score under the trained model."""
    return name.replace("reference", "policy", 1)


def reads_reference(scores: frozenset[str]) -> bool:
    """Whether any score needs a reference model."""
    named = any(name.startswith("reference_") for name in scores)
    return named or bool(scores & NEED_REFERENCE_WEIGHTS)


def sequence_weights(batch: PreferenceBatch) -> Float[Array, "rows T"]:
    """In how many sequences, of a prompt and one completion, each token is.

    1 for real tokens of padded batches.  In packed rows, a prompt is in one sequence
    with each of its completions.  0 for padding.
    """
    if batch.segments is None:
        lengths = flat_sequences(batch, batch.lengths)
        return (jnp.arange(batch.tokens.shape[-1]) < lengths[:, None]) * 1.0
    parts = batch.num_parts
    numbers = flat_sequences(batch, batch.segments)
    prompts = numbers % parts == 0
    counts = jnp.sum(batch.completion_lengths > 0, -1)
    # Compared with every slot: under Explicit axes, that needs no layout of a gather.
    is_slot = (numbers // parts)[..., None] == jnp.arange(counts.shape[-1])
    own = jnp.sum(jnp.where(is_slot, counts[:, None], 0), -1)
    return jnp.where(numbers < 0, 0, jnp.where(prompts, own, 1)) * 1.0


def last_places(
    segments: Segments,
    *,
    slots: int,
    sides: int,
) -> Int[Array, "rows SK"]:
    """The end of each completion in packed rows, [rows, slots * sides]; -1 if unused.

    Args:
      segments: the segment of each token; pairs are numbered by slot.
      slots: S.
      sides: K.
    """
    owner = jnp.arange(slots * sides)
    of_slot, part = owner // sides, owner % sides + 1
    pairs, parts = (x[..., None] for x in (segments.prompt_ids, segments.parts))
    place = jnp.arange(pairs.shape[1])[:, None]
    own = (pairs == of_slot) & (parts == part)
    return jnp.max(jnp.where(own, place, -1), axis=1)


def last_tokens(owners: Int[Array, "*rows P"]) -> Int[Array, "*rows P"]:
    """Completions of target tokens, -1 except for each completion's last token.

    A completion's tokens are adjacent in one sequence.
    """
    padding = [(0, 0)] * (owners.ndim - 1) + [(0, 1)]
    following = jnp.pad(owners[..., 1:], padding, constant_values=-1)
    return jnp.where(owners == following, -1, owners)


def ends(batch: PreferenceBatch) -> Int[Array, "sequences places"]:
    """The place of the last token of each completion in its sequence; -1 for none.

    Of packed rows, those of all completions [R, S K]; of padded ones, whose sequences
    have one completion each, [R K, 1].
    """
    _, slots, sides = batch.completion_lengths.shape
    segments = packing(batch)["segments"]
    if segments is not None:
        return last_places(segments, slots=slots, sides=sides)
    # A sequence ends with its completion, one position after the state that predicts
    # its last token.
    owners, predictors = (
        flat_sequences(batch, x) for x in (batch.completions, batch.predictors)
    )
    return jnp.max(jnp.where(owners >= 0, predictors, -2), axis=-1, keepdims=True) + 1


def flat_sequences(
    batch: PreferenceBatch, array: Shaped[Array | np.ndarray, "R Q ..."]
) -> Shaped[Array, "rows ..."]:
    """[R, Q, ...] to [R Q, ...]: all sequences of a micro-batch on one axis."""
    rows, sequences, _ = batch.tokens.shape
    return cast(Array, array.reshape(rows * sequences, *array.shape[2:]))


def packing(batch: PreferenceBatch) -> dict[str, Any]:
    """Positions [R Q, T] and segments of packed rows; None for padded batches."""
    if batch.segments is None or batch.positions is None:
        return {"positions": None, "segments": None}
    numbers, parts = flat_sequences(batch, batch.segments), batch.num_parts
    segments = Segments(numbers // parts, numbers % parts, completions=parts - 1)
    return {"positions": flat_sequences(batch, batch.positions), "segments": segments}
