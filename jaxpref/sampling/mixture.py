"""Guided decoding: a log-linear mixture of models, token by token.

    log p(v | x, y_<t) = log pi(v | x, y_<t) + sum_i w_i log p_i(v | x_i, y_<t) + const

pi is the model, and each guide p_i shares its vocabulary, with a prompt x_i of its own
if it is given one.  With the right guides and weights, this is

- GenARM: an autoregressive reward model with w = 1 / beta (arXiv:2410.08193);
- a KL penalty chosen after training: pi_DPO^(1 + w) / pi_ref^w;
- the training of a small model for a large one: w (log p_tuned - log p_base) (proxy
  tuning, arXiv:2401.08565; dynamic logits fusion, arXiv:2406.15480);
- contrastive decoding: -w log p_weak, among the tokens with pi >= min_p max pi
  (arXiv:2210.15097);
- classifier-free guidance: (1 + w) log pi(v | x) - w log pi(v | x_negative)
  (arXiv:2306.17806).

Axes: B rows, V vocabulary, G guides, D features of a model.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.models import Architecture, Model, Numerics, Params
from jaxpref.models.cache import Cache
from jaxpref.models.layout import SPECS, reshard
from jaxpref.models.logprobs import logits as project_to_logits

Logits = Float[Array, "B V"]
Hidden = tuple[Float[Array, "B 1 D"], ...]
"""Hidden states of the model and of each guide."""


class Mixed(NamedTuple):
    """The parameters of a `Mixture`."""

    params: tuple[Params, ...]
    """Of the model and of each guide."""
    weights: Float[Array, " 1+G"]
    """Of the model and of each guide; data, so other weights compile nothing."""
    min_p: Float[Array, ""] | float = 0.0
    """A token must be at least this many times as likely as the most likely one, under
    the model alone; 0 allows all tokens."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A model and its guides, with the methods that decoding needs of a `Model`.

    Its parameters are `Mixed`; hidden states and caches are tuples with one for each.
    """

    models: tuple[Model, ...]
    """The model, and then its guides."""

    @property
    def architecture(self) -> Architecture:
        """That of the model."""
        return self.models[0].architecture

    @property
    def numerics(self) -> Numerics:
        """Those of the model."""
        return self.models[0].numerics

    def empty_cache(self, params: Mixed, batch: int, length: int) -> tuple[Cache, ...]:
        """See `Model.empty_cache`."""
        pairs = zip(self.models, params.params, strict=True)
        return tuple(model.empty_cache(own, batch, length) for model, own in pairs)

    def prefill(
        self,
        params: Mixed,
        tokens: Any,
        lengths: Any,
    ) -> tuple[Hidden, tuple[Cache, ...]]:
        """See `Model.prefill`; tuples of prompts for each model, or one array."""
        if not isinstance(tokens, tuple):
            tokens, lengths = (
                (tokens,) * len(self.models),
                (lengths,) * len(self.models),
            )
        found = [
            model.prefill(own, own_tokens, own_lengths)
            for model, own, own_tokens, own_lengths in zip(
                self.models, params.params, tokens, lengths, strict=True
            )
        ]
        hidden, caches = zip(*found)
        return hidden, caches

    def decode(
        self,
        params: Mixed,
        tokens: Int[Array, " B"],
        cache: tuple[Cache, ...],
        active: Bool[Array, " B"],
    ) -> tuple[Hidden, tuple[Cache, ...]]:
        """See `Model.decode`."""
        found = [
            model.decode(own, tokens, own_cache, active)
            for model, own, own_cache in zip(
                self.models, params.params, cache, strict=True
            )
        ]
        hidden, caches = zip(*found)
        return hidden, caches

    def next_logits(self, params: Mixed, hidden: Hidden) -> tuple[Logits, Logits]:
        """See `next_logits`."""
        each = zip(self.models, params.params, hidden, strict=True)
        logits = [_logits(model, own, states) for model, own, states in each]
        return mix(logits, params.weights, params.min_p), logits[0]


LanguageModel = Model | Mixture
"""What can be sampled from."""


def mix(
    logits: list[Logits],
    weights: Float[Array, " 1+G"],
    min_p: Float[Array, ""] | float = 0.0,
) -> Logits:
    """Logits of the mixture: sum_i w_i z_i, -inf where z_0 - max z_0 < log min_p.

    Normalizing each model's logits would only add a constant to a row.

    Args:
        logits: of the model and of each guide.  The vocabularies may be padded to
            different sizes; a token that some model does not have is not allowed.
        weights: of the model and of each guide.
        min_p: see `Mixed`.

    Returns:
        In the shape of the model's logits.
    """
    own, common = logits[0], min(z.shape[-1] for z in logits)
    mixed = sum(w * z[:, :common] for w, z in zip(weights, logits, strict=True))
    lowest = jnp.max(own, axis=-1, keepdims=True) + jnp.log(min_p)
    allowed = own[:, :common] >= lowest
    rest = ((0, 0), (0, own.shape[-1] - common))
    return jnp.pad(jnp.where(allowed, mixed, -jnp.inf), rest, constant_values=-jnp.inf)


def next_logits(
    model: LanguageModel, params: Any, hidden: Any
) -> tuple[Logits, Logits]:
    """Logits of the next token: those by which it is chosen, and the model's own.

    They are the same unless the model has guides.  Rows are sharded, and the vocabulary
    is not.

    Args:
        model: the model.
        params: its parameters.
        hidden: from its `prefill` or `decode`.
    """
    if isinstance(model, Mixture):
        return model.next_logits(params, hidden)
    logits = _logits(model, params, hidden)
    return logits, logits


def _logits(model: Model, params: Params, hidden: Float[Array, "B 1 D"]) -> Logits:
    soft_cap = model.architecture.logit_soft_cap
    logits = project_to_logits(hidden, model.head(params), soft_cap)[:, 0]
    # Choosing needs the whole vocabulary on one device; rows stay sharded.
    return reshard(logits, SPECS.tokens)
