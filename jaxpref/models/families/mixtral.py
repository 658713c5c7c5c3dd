"""Mixtral: Llama with a mixture of experts in place of the MLP.

Axes: B rows, T tokens, D hidden, F feed-forward features of an expert, E experts,
L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxpref.errors import InputError
from jaxpref.models.architecture import MOST_WEIGHTS, at_least
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.experts import mixture
from jaxpref.models.families import llama
from jaxpref.models.families.family import Family, TensorName
from jaxpref.models.families.window import read_window
from jaxpref.models.layout import SHARDS, SPECS
from jaxpref.models.linear import dense_einsum
from jaxpref.models.numerics import Numerics
from jaxpref.models.transformer import Attend, Rngs, normal

EXPERTS_IN, EXPERTS_OUT = (
    P(None, "expert", "fsdp", "tensor"),
    P(None, "expert", "tensor", "fsdp"),
)
"""The shardings of the experts' matrices, [L, E, D, F] and [L, E, F, D]."""
ROUTER = P(None, SHARDS, None)
"""The sharding of the router, [L, D, E]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsArchitecture(llama.LlamaArchitecture):
    """Llama's architecture with experts; `intermediate_size` is that of one expert."""

    num_experts: int = at_least(1)
    experts_per_token: int = at_least(1)
    normalized: bool = True
    """Whether the weights of a token's experts are divided by their sum."""

    def __post_init__(self):
        super().__post_init__()
        if self.experts_per_token > self.num_experts:
            raise InputError(
                f"architecture: experts_per_token={self.experts_per_token} is more "
                f"than num_experts={self.num_experts}"
            )
        weights = self.num_layers * self.num_experts * self.intermediate_size
        if weights * self.hidden_size > MOST_WEIGHTS:
            raise InputError(
                f"architecture: num_experts={self.num_experts} implies matrices of "
                f"{weights * self.hidden_size:.1e} weights; check the sizes"
            )

    @property
    def sharded_sizes(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """See `Architecture`."""
        return super().sharded_sizes | {"num_experts": (("expert",),)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralArchitecture(ExpertsArchitecture):
    """The architecture of a Mixtral model."""

    @property
    def family(self) -> Family:
        """Mixtral."""
        return FAMILY


class ExpertsBlock(llama.LlamaBlock):
    """Llama's block, with a mixture of experts in place of the MLP."""

    architecture: ExpertsArchitecture

    def __init__(
        self, architecture: ExpertsArchitecture, numerics: Numerics, rngs: Rngs
    ):
        super().__init__(architecture, numerics, rngs)
        a, L, D = architecture, architecture.num_layers, architecture.hidden_size
        E, F = a.num_experts, a.intermediate_size
        drawn = lambda *args: normal(rngs, a, numerics, *args)
        self.router = drawn((L, D, E), ROUTER)
        self.gate = drawn((L, E, D, F), EXPERTS_IN)
        self.up = drawn((L, E, D, F), EXPERTS_IN)
        self.down = drawn((L, E, F, D), EXPERTS_OUT, (2 * L) ** -0.5)

    def probabilities(self, h: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """The router's softmax, which is in float32 or wider, as are its logits."""
        wide = jnp.promote_types(h.dtype, jnp.float32)
        logits = dense_einsum(
            "btd,de->bte", h, self.router[...], spec=SPECS.hidden, out_dtype=wide
        )
        return jax.nn.softmax(logits, -1)

    def routed(
        self, x: Float[Array, "B T D"], shared: Any, attributes: Any, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any, Float[Array, "B T E"]]:
        """One layer, and the probabilities of its router."""
        x, state = self.attention(x, shared, attributes, attend)
        h = self.norm(x, self.mlp_norm[...])
        p = self.probabilities(h)
        return x + self.mixture(h, p), state, p

    def mlp(self, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The mixture."""
        return self.mixture(h, self.probabilities(h))

    def mixture(
        self, h: Float[Array, "B T D"], probabilities: Float[Array, "B T E"]
    ) -> Float[Array, "B T D"]:
        """See `experts.mixture`."""
        return mixture(
            h,
            probabilities,
            self.gate[...],
            self.up[...],
            self.down[...],
            per_token=self.architecture.experts_per_token,
            normalized=self.architecture.normalized,
            activation=self.activation,
        )


class MixtralTransformer(llama.LlamaTransformer):
    """Mixtral's modules."""

    block = ExpertsBlock


EXPERT_FIELDS = (
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
)
"""Fields of config.json that only concern the training of the router."""


def read_config(fields: ConfigFields) -> MixtralArchitecture:
    """The architecture described by a config.json.

    Raises:
        InputError: if a field is missing, malformed, or has an unsupported value.
    """
    fields.require("hidden_act", "silu")
    sizes = llama.read_sizes(
        fields,
        theta=1e6,
        num_kv_heads=8,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096 * 32,
    )
    return MixtralArchitecture(
        **sizes,
        num_experts=fields.read("num_local_experts", int, 8),
        experts_per_token=fields.read("num_experts_per_tok", int, 2),
        sliding_window=read_window(fields),
    )


def write_sizes(architecture: ExpertsArchitecture) -> dict[str, Any]:
    """The fields that all families with experts have."""
    fields = llama.write_config(architecture)
    del fields["mlp_bias"]
    return fields | {"num_experts_per_tok": architecture.experts_per_token}


def write_config(architecture: MixtralArchitecture) -> dict[str, Any]:
    """The fields of a config.json that transformers 4 and 5 both read."""
    fields = write_sizes(architecture)
    del fields["attention_bias"]
    return fields | {
        "num_local_experts": architecture.num_experts,
        "sliding_window": architecture.sliding_window,
    }


def tensors(mlp: str, gate: str, up: str, down: str) -> dict[str, TensorName]:
    """The tensors of a family whose MLP and experts' matrices have these names."""
    expert = f"model.layers.{{}}.{mlp}.experts.{{}}."
    return llama.TENSORS | {
        "layers.router": TensorName(f"model.layers.{{}}.{mlp}.gate.weight", 1),
        "layers.gate": TensorName(f"{expert}{gate}.weight", 1),
        "layers.up": TensorName(f"{expert}{up}.weight", 1),
        "layers.down": TensorName(f"{expert}{down}.weight", 1),
    }


FAMILY = Family(
    model_type="mixtral",
    causal_lm="MixtralForCausalLM",
    classifier="MixtralForSequenceClassification",
    read_config=read_config,
    write_config=write_config,
    transformer=MixtralTransformer,
    tensors=tensors("block_sparse_moe", "w1", "w3", "w2"),
    harmless=EXPERT_FIELDS,
)
"""Mixtral."""
