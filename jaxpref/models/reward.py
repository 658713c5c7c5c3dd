"""Reward models: the same backbone with another head instead of the LM head.

An answer's score is read at its last real token, the only one that attends to all of
it: EOS, or the token at which the answer was cut.  `transformers` calls such a model
`AutoModelForSequenceClassification`, with one label for a reward.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxpref.errors import InputError
from jaxpref.models.architecture import Architecture
from jaxpref.models.attention import Segments
from jaxpref.models.experts import RouterSums
from jaxpref.models.folder_config import read_architecture, read_head
from jaxpref.models.functional import Model, Params
from jaxpref.models.layout import SPECS, reshard
from jaxpref.models.numerics import FLOAT32, Numerics
from jaxpref.models.reward_head import Head, without_head


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A transformer that scores answers, as pure functions of its parameters.

    Parameters are those of `Model` without `head`, and those of its own `head`.  The
    architecture is that of the backbone; `tie_word_embeddings` has no effect, because
    there is no LM head.  Hashable, and works on the same meshes as `Model`.
    """

    architecture: Architecture
    numerics: Numerics = FLOAT32
    head: Head = Head()

    @property
    def backbone(self) -> Model:
        """The model whose parameters are these without the head's."""
        return Model(self.architecture.backbone, self.numerics)

    def init(self, key: jax.Array) -> Params:
        """Random parameters, sharded over the current mesh.

        Raises:
            InputError: if the mesh does not fit the model; see `Model.init`.
        """
        of_backbone, of_head = jax.random.split(key)
        return self.backbone.init(of_backbone) | self.new_head(of_head)

    def new_head(self, key: PRNGKeyArray) -> Params:
        """The parameters of a random head; see `Head.init`."""
        dtype = jnp.dtype(self.numerics.param_dtype)
        return self.head.init(key, self.architecture.hidden_size, dtype)

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Segments | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states; see `Model.hidden`."""
        backbone = without_head(params)
        return self.backbone.hidden(backbone, tokens, positions, segments, lengths)

    def states_and_router(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        places: Int[Array, "B P"],
        positions: Int[Array, "B T"] | None = None,
        segments: Segments | None = None,
        *,
        counted: Float[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B P D"], RouterSums | None]:
        """The final hidden states at positions `places`, which the head reads.

        Rows are padded on the right, or packed; see `Model.hidden`.  For what the
        routers did, see `Model.hidden_and_heads`.
        """
        hidden, router = self.backbone.hidden_and_router(
            without_head(params), tokens, positions, segments, counted=counted
        )
        return _take(hidden, reshard(places, SPECS.tokens)), router

    def rewards(
        self, params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> Float[Array, " B"]:
        """Scores of the first lengths[b] tokens of each row.

        A sequence of length 0 gets the score of its first position.
        """
        states, _ = self.states_and_router(params, tokens, _ends(lengths))
        return self.head(params, states)[:, 0, 0]


def reward_model(folder: str | Path, numerics: Numerics = FLOAT32) -> RewardModel:
    """The reward model that a folder's config.json describes, without its weights.

    Raises:
        InputError: if it cannot be read, or describes none.
    """
    return RewardModel(read_architecture(folder), numerics, read_head(folder))


def check_one_reward(head: Head, flag: str) -> None:
    """Refuses a reward model that gives ratings or embeddings instead of one reward.

    Args:
        head: its head.
        flag: the option that names it, and its value, for the message.

    Raises:
        InputError: if that is what it gives.
    """
    if head.score != "rewards":
        what = "a vector that scores pairs of answers"
        if head.attributes:
            what = f"ratings of {', '.join(head.attributes)}"
        raise InputError(
            f"{flag}: gives {what}, and not one reward of each answer; evaluate it "
            "with jaxpref evaluate, and name a reward model such as the export of a "
            "run with --loss bradley_terry here"
        )


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
