"""Gemma: Llama with scaled embeddings, zero-centered norm weights and a GELU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.errors import InputError
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.families import llama
from jaxpref.models.families.family import Family
from jaxpref.models.numerics import Numerics
from jaxpref.models.soft_prompt import Prompted
from jaxpref.models.transformer import Rngs


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaArchitecture(llama.LlamaArchitecture):
    """The architecture of a Gemma model."""

    @property
    def embedding_scale(self) -> float:
        """sqrt(D)."""
        return self.hidden_size**0.5

    @property
    def family(self) -> Family:
        """Gemma."""
        return FAMILY


class GemmaBlock(llama.LlamaBlock):
    """Llama's block with Gemma's norms and activation."""

    activation = staticmethod(functools.partial(jax.nn.gelu, approximate=True))

    def __init__(
        self, architecture: llama.LlamaArchitecture, numerics: Numerics, rngs: Rngs
    ):
        super().__init__(architecture, numerics, rngs)
        center_gains(self)

    def norm(
        self, x: Float[Array, "*axes D"], gain: Float[Array, " D"]
    ) -> Float[Array, "*axes D"]:
        """RMSNorm with the gain 1 + `gain`, rounded once."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        normed = llama.rms_norm(
            x.astype(wide), 1 + gain.astype(wide), self.architecture.rms_norm_eps
        )
        return normed.astype(x.dtype)


def center_gains(module: Any) -> None:
    """Makes the initial gains of all norms in a module 0."""
    for name, value in vars(module).items():
        if name.endswith("norm"):
            value[...] = jnp.zeros_like(value[...])


class GemmaTransformer(llama.LlamaTransformer):
    """Gemma's modules; subclasses may use another block."""

    block = GemmaBlock

    def __init__(
        self, architecture: llama.LlamaArchitecture, numerics: Numerics, rngs: Rngs
    ):
        super().__init__(architecture, numerics, rngs)
        center_gains(self)

    def embed_tokens(
        self,
        table: Float[Array, "*N V D"] | Prompted,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Embeddings times sqrt(D), in the compute dtype; a soft prompt as it is."""
        if isinstance(table, Prompted):
            x = self.embed_tokens(table.table, tokens, positions)
            return table.replaced(x, positions)
        x = super().embed_tokens(table, tokens, positions)
        return x * jnp.asarray(self.architecture.embedding_scale, x.dtype)


def read_sizes(fields: ConfigFields, **defaults: Any) -> dict[str, Any]:
    """The arguments of `LlamaArchitecture` that all versions of Gemma share.

    Raises:
        InputError: if a field is missing, malformed, or has an unsupported value.
    """
    # "gelu" is an older name of the same function, in either of two fields.
    for name in ("hidden_act", "hidden_activation"):
        if fields.get(name) not in (None, "gelu", "gelu_pytorch_tanh"):
            raise InputError(
                f"{fields.source}: field {name} is {fields.get(name)!r}; only "
                "'gelu_pytorch_tanh' is supported, use a model that has it"
            )
    fields.require("use_bidirectional_attention", False)
    bias = fields.read("attention_bias", bool, False)
    standard = {"head_dim": 256, "tie_word_embeddings": True}
    sizes = llama.read_sizes(fields, **standard | defaults)
    return sizes | {"projection_bias": bias, "output_bias": bias}


def write_config(architecture: llama.LlamaArchitecture) -> dict[str, Any]:
    """See `Family`."""
    fields = llama.write_config(architecture)
    del fields["mlp_bias"]
    activation = "gelu_pytorch_tanh"
    return fields | {"hidden_act": activation, "hidden_activation": activation}


def read_config(fields: ConfigFields) -> GemmaArchitecture:
    """See `Family`."""
    sizes = read_sizes(fields, num_kv_heads=16, max_position_embeddings=8192)
    return GemmaArchitecture(**sizes)


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="gemma",
    causal_lm="GemmaForCausalLM",
    classifier="GemmaForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=GemmaTransformer,
    harmless=(),
)
