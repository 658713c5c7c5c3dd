"""Reward models: the same backbone with a scalar head instead of the LM head.

An answer's score is read at its last real token, the only one that attends to all of
it: EOS, or the token at which the answer was cut.  `transformers` calls such a model
`AutoModelForSequenceClassification` with one label.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxpref.models.architecture import Architecture
from jaxpref.models.attention import Segments
from jaxpref.models.experts import RouterSums
from jaxpref.models.functional import Model, Params
from jaxpref.models.layout import SPECS, on_mesh, reshard
from jaxpref.models.numerics import FLOAT32, Numerics
from jaxpref.sharding import ROWS

HEAD = P(None, None)
"""The head has one number per feature, too few to shard."""
PASSES = P(None, ROWS, None)


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A transformer that scores answers, as pure functions of its parameters.

    Parameters are those of `Model` without `head`, and `score` [D, 1].  The
    architecture is that of the backbone; `tie_word_embeddings` has no effect, because
    there is no LM head.  Hashable, and works on the same meshes as `Model`.
    """

    architecture: Architecture
    numerics: Numerics = FLOAT32

    @property
    def backbone(self) -> Model:
        """The model whose parameters are these without `score`."""
        return Model(self.architecture.backbone, self.numerics)

    def init(self, key: jax.Array) -> Params:
        """Random parameters, sharded over the current mesh.

        Raises:
            InputError: if the mesh does not fit the model; see `Model.init`.
        """
        of_backbone, of_score = jax.random.split(key)
        return self.backbone.init(of_backbone) | {"score": self.new_score(of_score)}

    def new_score(self, key: PRNGKeyArray) -> Float[Array, "D 1"]:
        """A random head: normal with variance 1 / (D + 1).

        The scores of an untrained head are then about as large as the features.  It
        is not zero, so that reward models with one backbone and different keys differ.

        Source: Stiennon et al. 2020, arXiv:2009.01325.
        """
        size = self.architecture.hidden_size
        dtype = jnp.dtype(self.numerics.param_dtype)
        draw = jax.random.normal(key, (size, 1), dtype, out_sharding=on_mesh(HEAD))
        return draw * jnp.asarray((size + 1) ** -0.5, dtype)

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Segments | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states; see `Model.hidden`."""
        backbone = {name: x for name, x in params.items() if name != "score"}
        return self.backbone.hidden(backbone, tokens, positions, segments, lengths)

    def rewards_and_router(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        places: Int[Array, "B P"],
        positions: Int[Array, "B T"] | None = None,
        segments: Segments | None = None,
        *,
        counted: Float[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B P"], RouterSums | None]:
        """Scores at positions `places`, float32 (float64 for float64 hidden states).

        Rows are padded on the right, or packed; see `Model.hidden`.  For what the
        routers did, see `Model.hidden_and_heads`.
        """
        backbone = {name: x for name, x in params.items() if name != "score"}
        hidden, router = self.backbone.hidden_and_router(
            backbone, tokens, positions, segments, counted=counted
        )
        scores = score_states(hidden, params["score"])
        return _take(scores, reshard(places, SPECS.tokens)), router

    def rewards(
        self, params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> Float[Array, " B"]:
        """Scores of the first lengths[b] tokens of each row.

        A sequence of length 0 gets the score of its first position.
        """
        return self.rewards_and_router(params, tokens, _ends(lengths))[0][:, 0]


def score_states(
    hidden: Float[Array, "B T D"], score: Float[Array, "D 1"]
) -> Float[Array, "B T"]:
    """Scores hidden @ score, in float32 or wider.

    The factors are in the dtype of `hidden`.
    """
    return jnp.einsum(
        "btd,d->bt",
        hidden,
        score[:, 0].astype(hidden.dtype),
        preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32),
        out_sharding=on_mesh(SPECS.tokens),
    )


def mc_rewards(
    model: RewardModel,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: PRNGKeyArray,
    *,
    rate: float = 0.1,
    passes: int = 10,
) -> Float[Array, "passes B"]:
    """Scores with dropout on the last hidden state: Monte Carlo dropout.

        out[t, b] = sum_d m[t, b, d] / (1 - rate) hidden[b, d] score[d]

    with independent m[t, b, d], 1 with probability 1 - rate and else 0.  The backbone,
    which is trained without dropout, runs once, and dropout applies to the head's input
    only.  So the passes cost almost nothing, and their spread is the uncertainty of the
    head, not of the backbone.  Their expectation is `model.rewards`.

    Passes and rows are independent.  The noise depends on a row's index in the batch.

    Args:
        model: the reward model.
        params: its parameters.
        tokens: rows, padded on the right.
        lengths: the number of real tokens in each row.
        key: a JAX random key.
        rate: the probability of dropping a feature, in [0, 1).
        passes: T of `jaxpref.noise.uncertainty`, >= 1.

    Raises:
        ValueError: if `rate` or `passes` is out of range.

    Sources: Gal and Ghahramani 2015, arXiv:1506.02142; UPO, arXiv:2409.11212, uses ten
    passes at a rate of 0.1.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"Expected rate in [0, 1), got {rate}.")
    if passes < 1:
        raise ValueError(f"Expected passes >= 1, got {passes}.")
    states = _take(model.hidden(params, tokens), reshard(_ends(lengths), SPECS.tokens))
    shape = (passes, states.shape[0], states.shape[2])
    uniform = jax.random.uniform(key, shape, out_sharding=on_mesh(PASSES))
    dropped = jnp.where(uniform < rate, 0, states[:, 0] / (1 - rate))
    return jax.vmap(lambda h: score_states(h[:, None], params["score"])[:, 0])(dropped)


@dataclasses.dataclass(frozen=True)
class Padding:
    """The token that pads the input of a reward model."""

    token: str
    """The token's text in the tokenizer files."""
    id: int
    """The token's index in the embedding."""


def padding_of(tokenizer: Any) -> Padding | None:
    """The token to pad a reward model's input with, or None if there is none.

    `transformers` reads the score at the last token that is not the padding token.  If
    the tokenizer pads with EOS, as many do, that would be the token before EOS, which
    ends an answer.  So this is the first of the following that is not EOS: the
    tokenizer's own padding token, BOS, the unknown token, and other special tokens.

    Args:
        tokenizer: a `transformers` tokenizer.
    """
    t = tokenizer
    for token in (t.pad_token, t.bos_token, t.unk_token, *t.all_special_tokens):
        if token is not None and token != t.eos_token:
            return Padding(token, t.convert_tokens_to_ids(token))
    return None


def _ends(lengths: jax.Array) -> jax.Array:
    return jnp.maximum(lengths - 1, 0)[:, None]


def _take(values: jax.Array, positions: jax.Array) -> jax.Array:
    """The values [B, P, ...] at positions [B, P] of [B, T, ...], row by row."""
    return jax.vmap(lambda v, i: v[i])(values, positions)
