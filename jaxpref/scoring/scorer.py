"""Scorers: what is trained, and how it scores a batch."""

import dataclasses
import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxpref.data.batch import PreferenceBatch
from jaxpref.models import Model, RewardModel, logprobs
from jaxpref.models.experts import RouterSums
from jaxpref.models.folder import load_params, save
from jaxpref.models.layout import SPECS, on_mesh
from jaxpref.models.reward import Padding
from jaxpref.models.weights import Weights, load_weights
from jaxpref.scoring.scores import (
    NEED_REFERENCE_WEIGHTS,
    ROUTER,
    TOKEN_SCORES,
    Scored,
    completion_sums,
    flat_sequences,
    last_places,
    last_tokens,
    packing,
    policy_name,
    sequence_weights,
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
        self,
        params: Params,
        frozen: Frozen,
        batch: PreferenceBatch,
        *,
        totals: Collection[str] = (),
    ) -> Scored:
        """The scores [R, S, K] of a micro-batch [R, ...], and the totals asked for."""
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
        self,
        params: Params,
        frozen: Frozen,
        batch: PreferenceBatch,
        *,
        totals: Collection[str] = (),
    ) -> Scored:
        """See `Scorer`."""
        flat = lambda array: flat_sequences(batch, array)
        tokens = flat(batch.tokens)
        read = functools.partial(
            self.model.hidden_and_heads, tokens=tokens, **packing(batch)
        )
        # No gradient flows through the reference.
        reference = None
        if self.needs_reference_weights:
            reference = jax.lax.stop_gradient(read(frozen)[:2])
        hidden, head, router = read(params, counted=_counted(batch, totals))
        wanted = sorted(self.scores)
        names = {n: None for score in wanted for n in TOKEN_SCORES[score].statistics}
        statistics = logprobs.token_statistics(
            tuple(names),
            hidden,
            head,
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
        return Scored(found, _totals(router))

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
        self,
        params: Params,
        frozen: Frozen,
        batch: PreferenceBatch,
        *,
        totals: Collection[str] = (),
    ) -> Scored:
        """See `Scorer`."""
        del frozen
        rows, slots, sides = batch.completion_lengths.shape
        flat = lambda array: flat_sequences(batch, array)
        packed = packing(batch)
        if (segments := packed["segments"]) is None:
            # A token's own state is one position after the state that predicts it.
            places = flat(batch.predictors) + 1
        else:
            places = last_places(segments, slots=slots, sides=sides)
        rewards, router = self.model.rewards_and_router(
            params,
            flat(batch.tokens),
            places,
            **packed,
            counted=_counted(batch, totals),
        )
        if segments is None:
            ends = dataclasses.replace(
                batch, completions=last_tokens(cast(jax.Array, batch.completions))
            )
            rewards = completion_sums(ends, rewards)
        else:
            rewards = jnp.where(places >= 0, rewards, 0)
            spread = on_mesh(SPECS.hidden)
            rewards = jnp.reshape(rewards, (rows, slots, sides), out_sharding=spread)
        return Scored({"rewards": rewards}, _totals(router))

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


def _counted(
    batch: PreferenceBatch, totals: Collection[str]
) -> Float[Array, "rows T"] | None:
    """How often each token counts in the routers' sums; None if no total needs them."""
    return sequence_weights(batch) if ROUTER in totals else None


def _totals(router: RouterSums | None) -> dict[str, Any]:
    return {} if router is None else {ROUTER: router}


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
