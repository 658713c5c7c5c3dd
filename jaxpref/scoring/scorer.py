"""Scorers: what is trained, and how it scores a batch."""

import dataclasses
import functools
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from jaxpref.data.batch import PreferenceBatch
from jaxpref.models import Model, RewardModel, logprobs
from jaxpref.models.experts import RouterSums
from jaxpref.models.folder import load_params, save
from jaxpref.models.layout import SPECS, on_mesh, reshard
from jaxpref.models.logprobs import REFERENCE, Statistic
from jaxpref.models.reward import Padding
from jaxpref.models.weights import Weights, load_weights
from jaxpref.scoring.degrees import DegreeHead
from jaxpref.scoring.hidden_sums import Ches
from jaxpref.scoring.scores import (
    MASK_SCORES,
    ROUTER,
    TOKEN_SCORES,
    Scored,
    TokenScore,
    completion_sums,
    flat_sequences,
    models_read,
    packing,
    policy_name,
    sequence_weights,
)
from jaxpref.scoring.token_masks import ActivationMasks, LearnedMasks
from jaxpref.scoring.values import ValueHead
from jaxpref.sharding import ROWS

Params = Any
"""What is trained: a pytree of arrays."""
Frozen = Mapping[str, Any]
"""Arrays that a scorer reads and that never change: the weights of frozen models, such
as "reference", by name."""
OfHidden = DegreeHead | ValueHead | Ches
"""What gives further scores from the final hidden states."""


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

    @property
    def models(self) -> frozenset[str]:
        """Names of the frozen models whose weights it reads in every step."""
        ...

    def load_frozen(self, folder: Path, models: Mapping[str, Weights]) -> Frozen:
        """The frozen parameters: of the initial model, and of `models` by name.

        Args:
          folder: the initial model's folder.
          models: where the weights of frozen models are; others than its own
            `models` are not read.
        """
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

    def policy(self, params: Params, frozen: Frozen) -> tuple[Model, Params]:
        """The language model that is trained, and its parameters, to sample from.

        It is the first one if two are trained.

        Raises:
          ValueError: if it is a reward model.
        """
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
    statistics: tuple[Statistic, ...] = ()
    """Statistics that the objective defines; their sums over the tokens of each
    completion are scores, too."""
    heads: ActivationMasks | LearnedMasks | OfHidden | None = None
    """What gives further scores, such as those of an objective's `heads`; or None."""

    @property
    def models(self) -> frozenset[str]:
        """See `Scorer`."""
        return models_read(self.scores, self.statistics)

    def init(self, key: PRNGKeyArray) -> Params:
        """See `Scorer`."""
        return self.model.init(key)

    def load(self, folder: Path, key: PRNGKeyArray) -> Params:
        """See `Scorer`."""
        return load_params(folder, self.model, key)

    def load_frozen(self, folder: Path, models: Mapping[str, Weights]) -> Frozen:
        """See `Scorer`."""
        del folder
        return {
            name: load_weights(models[name], self.model) for name in sorted(self.models)
        }

    def reference_params(
        self, reference: Weights, frozen: Frozen, params: Params | None
    ) -> Params:
        """See `Scorer`."""
        del frozen
        return load_weights(reference, self.model) if params is None else params

    def init_frozen(self, key: PRNGKeyArray) -> Frozen:
        """See `Scorer`."""
        return {name: self.model.init(key) for name in sorted(self.models)}

    def __call__(
        self,
        params: Params,
        frozen: Frozen,
        batch: PreferenceBatch,
        *,
        totals: Collection[str] = (),
        heads: Mapping[str, Array] = types.MappingProxyType({}),
    ) -> Scored:
        """See `Scorer`; `heads` are the parameters of its heads."""
        flat = lambda array: flat_sequences(batch, array)
        inputs: Any = {"tokens": flat(batch.tokens), **packing(batch)}
        read = functools.partial(self.model.hidden_and_heads, **inputs)
        # No gradient flows through frozen models.
        others = {
            name: jax.lax.stop_gradient(read(frozen[name])[:2])
            for name in sorted(self.models - ({REFERENCE} if self._masks else set()))
        }
        masks = {}
        if self._masks is not None:
            reference = jax.lax.stop_gradient(frozen[REFERENCE])
            of_reference = self._masked_reference(reference, heads, inputs, batch)
            others[REFERENCE], masks = of_reference[:2], of_reference[2]
        hidden, head, router = read(params, counted=counted_tokens(batch, totals))
        scores = self._token_scores()
        names = {n: None for score in scores.values() for n in score.statistics}
        statistics = masks | logprobs.token_statistics(
            tuple(name for name in names if name not in masks),
            hidden,
            head,
            flat(batch.predictors),
            flat(batch.targets),
            others=others,
            among=logprobs.STATISTICS | {own.name: own for own in self.statistics},
            chunk_size=self.chunk_size,
            soft_cap=self.model.architecture.logit_soft_cap,
        )
        found = {
            name: score.combine(batch, *(statistics[n] for n in score.statistics))
            for name, score in scores.items()
        }
        if isinstance(self.heads, OfHidden):
            found |= self.heads.scores(hidden, heads, batch)
        return Scored(found, totals_of(router))

    @property
    def _masks(self) -> ActivationMasks | LearnedMasks | None:
        return None if isinstance(self.heads, OfHidden) else self.heads

    def _token_scores(self) -> dict[str, TokenScore]:
        own = {x.name: TokenScore((x.name,), completion_sums) for x in self.statistics}
        masked = {} if self._masks is None else dict(MASK_SCORES)
        return {name: TOKEN_SCORES[name] for name in sorted(self.scores)} | own | masked

    def _masked_reference(
        self,
        reference: Params,
        heads: Mapping[str, Array],
        inputs: Any,
        batch: PreferenceBatch,
    ) -> tuple[Array, Array, dict[str, Float[Array, "rows P"]]]:
        """The reference's hidden states and head, and the masks, by statistic."""
        made: Any = self._masks
        hidden, head, readouts = self.model.hidden_head_and_readouts(
            reference, **inputs, readout=made.readout, heads=made.layers(heads)
        )
        predictors = reshard(flat_sequences(batch, batch.predictors), SPECS.tokens)
        # Under vmap, a gather within a row needs no sharding annotation.
        at = jax.vmap(jax.vmap(lambda states, i: states[i]), in_axes=(0, None))
        readouts = at(readouts, predictors)
        shape = (len(readouts), *batch.targets.shape, readouts.shape[-1])
        spread = on_mesh(P(None, ROWS, None, None, None))
        readouts = jnp.reshape(readouts, shape, out_sharding=spread)
        rewards, kls = (
            jnp.reshape(x, predictors.shape, out_sharding=on_mesh(SPECS.tokens))
            for x in made.masks(readouts, heads, batch)
        )
        return hidden, head, {"reward_masks": rewards, "kl_masks": kls}

    def policy(self, params: Params, frozen: Frozen) -> tuple[Model, Params]:
        """See `Scorer`."""
        del frozen
        return self.model, params

    def of_reference(self, stored: frozenset[str]) -> Scorer:
        """See `Scorer`."""
        scores = frozenset(map(policy_name, stored)) | {"policy_logps"}
        return dataclasses.replace(self, scores=scores, statistics=(), heads=None)

    def with_scores(self, stored: frozenset[str]) -> Scorer:
        """See `Scorer`; all parameters are trained, so it is that of any reference."""
        return self.of_reference(stored)

    def with_remat(self, policy: str) -> Scorer:
        """See `Scorer`."""
        return dataclasses.replace(self, model=with_numerics(self.model, remat=policy))

    def export(self, params: Params, folder: Path, options: ExportOptions) -> None:
        """See `Scorer`."""
        save_model(self.model, params, folder, options)


def counted_tokens(
    batch: PreferenceBatch, totals: Collection[str]
) -> Float[Array, "rows T"] | None:
    """How often each token counts in the routers' sums; None if no total needs them."""
    return sequence_weights(batch) if ROUTER in totals else None


def totals_of(router: RouterSums | None) -> dict[str, Any]:
    """The totals of a micro-batch, by name."""
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
