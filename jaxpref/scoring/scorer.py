"""Scorers: what is trained, and how it scores a batch."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxpref.data.batch import PreferenceBatch
from jaxpref.models import Model, RewardModel, logprobs
from jaxpref.models.attention import Segments
from jaxpref.models.folder import load_params, save
from jaxpref.models.layout import SPECS, on_mesh
from jaxpref.models.reward import Padding
from jaxpref.models.weights import Weights, load_weights
from jaxpref.scoring.scores import (
    NEED_REFERENCE_WEIGHTS,
    TOKEN_SCORES,
    Scores,
    completion_sums,
    computed_scores,
    flat_sequences,
    last_places,
    last_tokens,
    policy_name,
)

Params = Any
"""What is trained: a pytree of arrays."""
Frozen = Any
"""Additional arrays that never change, such as a live reference; or None."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How a trained model is exported."""

    source: Path
    """The initial model's folder; its tokenizer and other files are copied, and so are
    weights that are frozen."""
    name: str
    """The initial model as the user named it, for an adapter's config."""
    dtype: str = "float32"
    """Dtype of the exported weights."""
    padding: Padding | None = None
    """The padding token of a reward model's input."""
    stop_tokens: tuple[int, ...] = ()
    """Tokens that end an answer."""


class Scorer(Protocol):
    """What is trained and how it scores a batch; holds no arrays itself."""

    def init(self, key: PRNGKeyArray) -> Params:
        """Random parameters, sharded over the current mesh."""
        ...

    def load(self, folder: Path, key: PRNGKeyArray) -> Params:
        """The initial parameters: those in the folder; missing ones are random."""
        ...

    def load_frozen(self, folder: Path, reference: Weights | None) -> Frozen:
        """The frozen parameters: of the initial model, and a live reference's."""
        ...

    def reference_params(
        self, reference: Weights, frozen: Frozen, params: Params | None
    ) -> Params:
        """The parameters of the reference, for the scorer `of_reference`.

        Args:
          reference: where they are.
          frozen: from `load_frozen`.
          params: the trained parameters, if they are still those of the reference.
        """
        ...

    def init_frozen(self, key: PRNGKeyArray) -> Frozen:
        """Random frozen parameters, for `jax.eval_shape`."""
        ...

    def __call__(
        self, params: Params, frozen: Frozen, batch: PreferenceBatch
    ) -> dict[str, Any]:
        """The scores [R, S, K] of a micro-batch [R, ...]; of twins, by model."""
        ...

    def of_reference(self, stored: frozenset[str]) -> "Scorer":
        """The scorer of the reference, which is one model; uses the policy's names.

        It has the same kernels as the trained model, so that both agree at the start.
        """
        ...

    def with_scores(self, stored: frozenset[str]) -> "Scorer":
        """The scorer of a reference with parameters like those that are trained.

        Uses the policy's names of the scores.
        """
        ...

    def with_remat(self, policy: str) -> "Scorer":
        """The scorer with another policy for recomputing activations."""
        ...

    def export(self, params: Params, folder: Path, options: ExportOptions) -> None:
        """Writes a Hugging Face folder."""


@dataclasses.dataclass(frozen=True)
class PolicyScorer:
    """A language model whose parameters are all trained, with log-prob scores.

    The backbone runs on every token, the LM head on completion tokens only,
    `chunk_size` of them at a time.
    """

    model: Model
    scores: frozenset[str]
    """Names from `TOKEN_SCORES`."""
    chunk_size: int | None = None
    """Completion tokens per sequence whose logits are in memory at once; by default
    `logprobs.default_chunk`."""

    @property
    def needs_reference_weights(self) -> bool:
        """Whether `frozen` is the reference's parameters."""
        return bool(self.scores & NEED_REFERENCE_WEIGHTS)

    def init(self, key: PRNGKeyArray) -> Params:
        """See `Scorer`."""
        return self.model.init(key)

    def load(self, folder: Path, key: PRNGKeyArray) -> Params:
        """See `Scorer`."""
        return load_params(folder, self.model, key)

    def load_frozen(self, folder: Path, reference: Weights | None) -> Frozen:
        """The reference's parameters if a score needs them, or None."""
        del folder
        if not self.needs_reference_weights or reference is None:
            return None
        return load_weights(reference, self.model)

    def reference_params(
        self, reference: Weights, frozen: Frozen, params: Params | None
    ) -> Params:
        """See `Scorer`."""
        del frozen
        return load_weights(reference, self.model) if params is None else params

    def init_frozen(self, key: PRNGKeyArray) -> Frozen:
        """See `Scorer`."""
        return self.model.init(key) if self.needs_reference_weights else None

    def __call__(
        self, params: Params, frozen: Frozen, batch: PreferenceBatch
    ) -> Scores:
        """See `Scorer`."""
        flat = lambda array: flat_sequences(batch, array)
        tokens = flat(batch.tokens)
        read = lambda p: self.model.hidden_and_heads(p, tokens, *_packing(batch))
        # No gradient flows through the reference.
        reference = None
        if self.needs_reference_weights:
            reference = jax.lax.stop_gradient(read(frozen))
        wanted = sorted(self.scores)
        names = {n: None for score in wanted for n in TOKEN_SCORES[score].statistics}
        statistics = logprobs.token_statistics(
            tuple(names),
            *read(params),
            flat(batch.predictors),
            flat(batch.targets),
            reference=reference,
            chunk_size=self.chunk_size,
            soft_cap=self.model.architecture.logit_soft_cap,
        )
        found = {}
        for name in wanted:
            score = TOKEN_SCORES[name]
            arrays = (statistics[n] for n in score.statistics)
            found[name] = score.combine(batch, *arrays)
        return found

    def of_reference(self, stored: frozenset[str]) -> Scorer:
        """See `Scorer`."""
        scores = frozenset(map(policy_name, stored)) | {"policy_logps"}
        return dataclasses.replace(self, scores=scores)

    def with_scores(self, stored: frozenset[str]) -> Scorer:
        """See `Scorer`; all parameters are trained, so it is that of any reference."""
        return self.of_reference(stored)

    def with_remat(self, policy: str) -> Scorer:
        """See `Scorer`."""
        return dataclasses.replace(self, model=with_numerics(self.model, remat=policy))

    def export(self, params: Params, folder: Path, options: ExportOptions) -> None:
        """See `Scorer`."""
        save_model(self.model, params, folder, options)


@dataclasses.dataclass(frozen=True)
class RewardScorer:
    """A reward model: one score per completion, read at its last token."""

    model: RewardModel

    def init(self, key: PRNGKeyArray) -> Params:
        """See `Scorer`."""
        return self.model.init(key)

    def load(self, folder: Path, key: PRNGKeyArray) -> Params:
        """The folder's backbone and head; a new head if it has none."""
        return load_params(folder, self.model, key)

    def load_frozen(self, folder: Path, reference: Weights | None) -> Frozen:
        """None: reward-model losses need no reference."""
        del folder, reference
        return None

    def reference_params(
        self, reference: Weights, frozen: Frozen, params: Params | None
    ) -> Params:
        """The trained parameters; reward-model losses need no reference."""
        del reference, frozen
        return params

    def init_frozen(self, key: PRNGKeyArray) -> Frozen:
        """None: reward-model losses need no reference."""
        del key
        return None

    def __call__(
        self, params: Params, frozen: Frozen, batch: PreferenceBatch
    ) -> Scores:
        """See `Scorer`."""
        del frozen
        rows, slots, sides = batch.completion_lengths.shape
        flat = lambda array: flat_sequences(batch, array)
        tokens = flat(batch.tokens)
        positions, segments = _packing(batch)
        if segments is None:
            # A token's own state is one position after the state that predicts it.
            at = flat(batch.predictors) + 1
            rewards = self.model.rewards_at(params, tokens, at)
            ends = dataclasses.replace(
                batch, completions=last_tokens(cast(jax.Array, batch.completions))
            )
            return {"rewards": completion_sums(ends, rewards)}
        ends = last_places(segments, slots=slots, sides=sides)
        rewards = self.model.rewards_at(params, tokens, ends, positions, segments)
        rewards = jnp.where(ends >= 0, rewards, 0)
        shape = (rows, slots, sides)
        spread = on_mesh(SPECS.hidden)
        return {"rewards": jnp.reshape(rewards, shape, out_sharding=spread)}

    def of_reference(self, stored: frozenset[str]) -> Scorer:
        """The scorer itself: reward-model losses need no reference."""
        del stored
        return self

    def with_scores(self, stored: frozenset[str]) -> Scorer:
        """The scorer itself: reward-model losses need no reference."""
        del stored
        return self

    def with_remat(self, policy: str) -> Scorer:
        """See `Scorer`."""
        return dataclasses.replace(self, model=with_numerics(self.model, remat=policy))

    def export(self, params: Params, folder: Path, options: ExportOptions) -> None:
        """See `Scorer`."""
        save_model(self.model, params, folder, options)


@dataclasses.dataclass(frozen=True)
class TwinScorer:
    """Two models of the same kind, trained together; "one" and "two" are the keys."""

    one: Scorer

    def init(self, key: PRNGKeyArray) -> Params:
        """See `Scorer`."""
        return {"one": self.one.init(key), "two": self.one.init(second(key))}

    def load(self, folder: Path, key: PRNGKeyArray) -> Params:
        """Loads both from one folder; missing parameters are drawn independently."""
        return {
            "one": self.one.load(folder, key),
            "two": self.one.load(folder, second(key)),
        }

    def load_frozen(self, folder: Path, reference: Weights | None) -> Frozen:
        """What both models share."""
        return self.one.load_frozen(folder, reference)

    def reference_params(
        self, reference: Weights, frozen: Frozen, params: Params | None
    ) -> Params:
        """See `Scorer`; the first model's parameters."""
        one = None if params is None else params["one"]
        return self.one.reference_params(reference, frozen, one)

    def init_frozen(self, key: PRNGKeyArray) -> Frozen:
        """See `Scorer`."""
        return self.one.init_frozen(key)

    def __call__(
        self, params: Params, frozen: Frozen, batch: PreferenceBatch
    ) -> dict[str, Scores]:
        """The scores of both models."""
        return {m: self.one(params[m], frozen, batch) for m in ("one", "two")}

    def of_reference(self, stored: frozenset[str]) -> Scorer:
        """The reference scorer of a single model."""
        return self.one.of_reference(stored)

    def with_scores(self, stored: frozenset[str]) -> Scorer:
        """The scorers of a reference of each model."""
        return TwinScorer(self.one.with_scores(stored))

    def with_remat(self, policy: str) -> Scorer:
        """See `Scorer`."""
        return TwinScorer(self.one.with_remat(policy))

    def export(self, params: Params, folder: Path, options: ExportOptions) -> None:
        """Exports the first model to `folder` and the second to `<folder>_two`."""
        self.one.export(params["one"], folder, options)
        two = folder.with_name(f"{folder.name}_two")
        self.one.export(params["two"], two, options)


def second(key: PRNGKeyArray) -> jax.Array:
    """The second model's random key."""
    return jax.random.fold_in(key, 1)


def make_scorer(
    model: Model | RewardModel,
    scores: frozenset[str],
    *,
    chunk_size: int | None = None,
    num_models: int = 1,
    trained: Callable[[PolicyScorer | RewardScorer], Scorer] = lambda whole: whole,
) -> Scorer:
    """The scorer for an objective that reads `scores`.

    Args:
      model: a language model, or a reward model if `scores` contains "rewards".
      scores: see `Objective.scores`.
      chunk_size: see `PolicyScorer`.
      num_models: 2 for two models trained together.
      trained: the scorer of a model of which a part is trained, from that of the whole
        model; see `partition`.
    """
    if isinstance(model, RewardModel):
        scorer = trained(RewardScorer(model))
    else:
        scorer = trained(PolicyScorer(model, computed_scores(scores), chunk_size))
    return scorer if num_models == 1 else TwinScorer(scorer)


def _packing(batch: PreferenceBatch) -> tuple:
    """Positions [R Q, T] and segments of packed rows; None for padded batches."""
    if batch.segments is None or batch.positions is None:
        return None, None
    numbers, parts = flat_sequences(batch, batch.segments), batch.num_parts
    segments = Segments(numbers // parts, numbers % parts, completions=parts - 1)
    return flat_sequences(batch, batch.positions), segments


def with_numerics(model: Model | RewardModel, **changes: Any) -> Any:
    """The model with other `Numerics`."""
    numerics = dataclasses.replace(model.numerics, **changes)
    return dataclasses.replace(model, numerics=numerics)


def save_model(
    model: Model | RewardModel, params: Params, folder: Path, options: ExportOptions
) -> None:
    """Writes a Hugging Face folder."""
    save(
        folder,
        model,
        params,
        options.source,
        options.dtype,
        padding=options.padding,
        stop_tokens=options.stop_tokens,
    )
