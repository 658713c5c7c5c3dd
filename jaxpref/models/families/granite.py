"""Granite 3: Llama with a factor on embeddings, scores, residuals and logits.

Axes: B rows, T tokens, D hidden, H query heads, K head features, V vocabulary.
"""

import dataclasses
from typing import Any

from jaxtyping import Array, Float, Int

from jaxpref.models.architecture import at_least
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families import llama
from jaxpref.models.families.family import Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteArchitecture(llama.LlamaArchitecture):
    """The architecture of a Granite model."""

    embedding_multiplier: float = at_least(0, default=1.0)
    attention_multiplier: float = at_least(0, default=1.0)
    """The factor of the scores, in place of 1/sqrt(K)."""
    residual_multiplier: float = at_least(0, default=1.0)
    logits_scaling: float = at_least(1e-6, default=1.0)
    """The divisor of the logits."""

    @property
    def family(self) -> Family:
        """Granite."""
        return FAMILY

    @property
    def backbone(self) -> "GraniteArchitecture":
        """See `Architecture`; a reward model's score is not divided."""
        return dataclasses.replace(self, tie_word_embeddings=True, logits_scaling=1.0)


class GraniteBlock(llama.LlamaBlock):
    """Llama's block, with factors on the scores and on what each part adds."""

    architecture: GraniteArchitecture

    def project(self, h: Float[Array, "B T D"]) -> llama.QueriesKeysValues:
        """Queries, times attention_multiplier sqrt(K); keys and values."""
        a = self.architecture
        q, k, v = super().project(h)
        return q * (a.attention_multiplier * a.head_dim**0.5), k, v

    def combine_heads(self, attended: Float[Array, "B T H K"]) -> Float[Array, "B T D"]:
        """The output projection of attention, times residual_multiplier."""
        return super().combine_heads(attended) * self.architecture.residual_multiplier

    def mlp(self, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Llama's MLP, times residual_multiplier."""
        return super().mlp(h) * self.architecture.residual_multiplier


class GraniteTransformer(llama.LlamaTransformer):
    """Granite's modules."""

    block = GraniteBlock
    architecture: GraniteArchitecture

    def embed_tokens(
        self,
        table: Float[Array, "*N V D"],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Embeddings, times embedding_multiplier."""
        x = super().embed_tokens(table, tokens, positions)
        return x * self.architecture.embedding_multiplier

    def final_norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """RMSNorm, divided by logits_scaling, so that the logits are."""
        return super().final_norm(x) / self.architecture.logits_scaling


FACTORS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
"""Fields of the architecture with the same names in config.json."""


def read_config(fields: ConfigFields) -> GraniteArchitecture:
    """The architecture described by a config.json.

    Raises:
        InputError: if a field is missing, malformed, or has an unsupported value.
    """
    fields.require("hidden_act", "silu")
    factors = {name: fields.read(name, float, 1.0) for name in FACTORS}
    biases = llama.read_biases(fields)
    return GraniteArchitecture(**llama.read_sizes(fields), **biases, **factors)


def write_config(architecture: GraniteArchitecture) -> dict[str, Any]:
    """The fields of a config.json that transformers 4 and 5 both read."""
    factors = {name: getattr(architecture, name) for name in FACTORS}
    return llama.write_config(architecture) | factors


FAMILY = Family(
    model_type="granite",
    causal_lm="GraniteForCausalLM",
    classifier="GraniteForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=GraniteTransformer,
    tensors=llama.TENSORS,
)
"""Granite 3; `transformers` has no sequence classifier of it."""
