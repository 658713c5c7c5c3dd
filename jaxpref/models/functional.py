"""The model as pure functions of its parameters; the only file that splits NNX."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxpref.models import logprobs
from jaxpref.models.architecture import Architecture
from jaxpref.models.attention import (
    Segments,
    causal_attention,
    packed_attention,
    reach_of,
)
from jaxpref.models.dense_attention import attention
from jaxpref.models.layout import SPECS, check_mesh, on_mesh, reshard
from jaxpref.models.linear import PRODUCT
from jaxpref.models.numerics import FLOAT32, Numerics
from jaxpref.models.transformer import Attend, Block, Transformer

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, for one batch of sequences."""

    keys: Float[Array, "L B S G K"]
    """In the compute dtype, with rotary positions applied."""
    values: Float[Array, "L B S G K"]
    """In the compute dtype."""
    start: Int[Array, " B"]
    """int32; the slot of each row's first real token, after the left padding."""
    filled: Int[Array, ""]
    """int32; slots written so far, the same in every row."""


@functools.cache
def _graphs(architecture: Architecture, numerics: Numerics) -> tuple[Any, Any]:
    # The structures without arrays.  Layouts are part of the arrays' types, so the same
    # structures work for every mesh.
    make = architecture.family.transformer
    module = nnx.eval_shape(lambda: make(architecture, numerics, nnx.Rngs(0)))
    return nnx.split(module)[0], nnx.split(module.layers)[0]


def _remat(layer: Callable, policy: str) -> Callable:
    if policy == "none":
        return layer
    saved = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    # Within a scan, nothing can be merged across the barrier anyway.
    return jax.checkpoint(
        layer, policy=saved if policy == "dots" else None, prevent_cse=False
    )


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder-only transformer as pure functions of its parameters.

    Parameters are a nested dict: `embed` [V, D], `layers` (each leaf [L, ...]), those
    of the family's final norm and, unless tied, `head` [D, V].  A weight of the layers
    may be a `LowRank`, and `layers` may be a tuple of stacks, which follow each other:
    so a part of a parameter can be trained (see `partition`).  The functions work
    without a mesh and under an Explicit mesh with axes `data`, `fsdp`, `tensor` set by
    `jax.set_mesh`; there B must be a multiple of data * fsdp.  A model holds no arrays
    and is hashable: a static argument of `jax.jit`.
    """

    architecture: Architecture
    numerics: Numerics = FLOAT32

    def _transformer(self, params: Params) -> Transformer:
        whole = params | {"layers": _stacks(params["layers"])[0]}
        return nnx.merge(_graphs(self.architecture, self.numerics)[0], whole)

    def _layer(self, weights: Params) -> Block:
        return nnx.merge(_graphs(self.architecture, self.numerics)[1], weights)

    def init(self, key: PRNGKeyArray) -> Params:
        """Random parameters, sharded over the current mesh.

        Matrices are normal with standard deviation `initializer_range`, divided by
        sqrt(2 L) for those that write to the residual stream; gains are one.
        `jax.eval_shape(model.init, key)` returns shapes and layouts without allocating
        memory.

        Raises:
            InputError: if the mesh's axes are not Explicit `data`, `fsdp`, and
                `tensor`, or do not divide the model's sizes.
        """
        check_mesh(self.architecture)
        make = self.architecture.family.transformer
        module = make(self.architecture, self.numerics, nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Segments | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states, in the compute dtype.

        Args:
            params: parameters.
            tokens: rows, padded on the right or packed.
            positions: by default 0, 1, 2, ... in every row.
            segments: the segments of packed rows.  By default, every token attends to
                all earlier ones, which is correct for rows padded on the right.
            lengths: the number of real tokens in rows that are not packed.  Attention
                to and from padding is then skipped, and its states are meaningless.
        """
        transformer = self._transformer(params)
        inputs = tokens, positions, segments, lengths
        return self._hidden(transformer, transformer.table(), params, *inputs)

    def hidden_and_heads(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Segments | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "*N D V"]]:
        """`hidden`, and the LM head for `token_logps`.

        The head [N, D, V] has one copy for each of the N row groups of the mesh, or is
        [D, V] if there is one.  Training uses it in place of `head`: its gradient is
        summed over devices only once, together with that of a tied embedding.
        """
        transformer = self._transformer(params)
        table = transformer.table()
        inputs = tokens, positions, segments, lengths
        hidden = self._hidden(transformer, table, params, *inputs)
        return hidden, transformer.heads(table)

    def _hidden(
        self,
        transformer: Transformer,
        table,
        params,
        tokens,
        positions,
        segments,
        lengths,
    ) -> jax.Array:
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        else:
            positions = reshard(positions, SPECS.tokens)
        shared = transformer.shared_inputs(positions)
        attend = self._attend(segments, positions, lengths)

        def layer(x, weights_and_attributes):
            weights, attributes = weights_and_attributes
            x, _ = self._layer(weights)(x, shared, attributes, attend)
            return x, None

        layer = _remat(layer, self.numerics.remat)
        x = transformer.embed_tokens(table, tokens, positions)
        for layers in _with_weights(params["layers"], transformer.layer_attributes()):
            unroll = min(self.numerics.unroll, _num_layers(layers[0]))
            x, _ = jax.lax.scan(layer, x, layers, unroll=unroll)
        return transformer.final_norm(x)

    def _attend(self, segments: Segments | None, positions, lengths) -> Attend:
        """Attention over whole rows, packed or not."""
        options: Any = dict(
            window=self.architecture.sliding_window,
            soft_cap=self.architecture.attention_soft_cap,
            twice_differentiable=self.numerics.twice_differentiable,
        )
        if segments is not None:
            ids, parts, completions = Segments(*segments)
            ids, parts = reshard(ids, SPECS.tokens), reshard(parts, SPECS.tokens)
            packed = Segments(ids, parts, completions)
            return lambda q, k, v, sliding=True: (
                packed_attention(q, k, v, packed, positions, sliding, **options),
                None,
            )
        if lengths is not None:
            lengths = reshard(lengths, SPECS.rows)
        return lambda q, k, v, sliding=True: (
            causal_attention(q, k, v, lengths, sliding, **options),
            None,
        )

    def head(self, params: Params) -> Float[Array, "D V"]:
        """The LM head in the parameter dtype (if tied, the embedding transposed)."""
        return self._transformer(params).head_weight()

    def logits(
        self, params: Params, tokens: Int[Array, "B T"]
    ) -> Float[Array, "B T V"]:
        """Logits in float32 or wider; for tests, never for training."""
        hidden, soft_cap = self.hidden(params, tokens), self.architecture.logit_soft_cap
        return logprobs.logits(hidden, self.head(params), soft_cap)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `batch` rows of at most `length` tokens."""
        a = self.architecture
        shape = (a.num_layers, batch, length, a.num_kv_heads, a.head_dim)
        zeros = lambda: jnp.zeros(
            shape, self.numerics.compute_dtype, out_sharding=on_mesh(SPECS.cache)
        )
        start = reshard(jnp.zeros(batch, jnp.int32), SPECS.rows)
        return Cache(zeros(), zeros(), start, jnp.zeros((), jnp.int32))

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        cache: Cache,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states of prompts padded on the left, and the filled cache.

        Args:
            params: parameters.
            tokens: prompts; that of row b is in the last `lengths[b]` positions.
            lengths: the number of real tokens in each row.
            cache: an empty cache of length >= T.

        Raises:
            ValueError: if the prompts are longer than the cache.
        """
        start = reshard(tokens.shape[1] - lengths, SPECS.rows)
        cache = dataclasses.replace(cache, start=start.astype(jnp.int32))
        return self.decode(params, tokens, cache)

    def decode(
        self, params: Params, tokens: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states of the next T tokens, and the updated cache.

        The caller must stay within the cache: filled + T <= its length.  `filled` is
        data, so a step beyond it raises no error; it overwrites the last slots.

        Raises:
            ValueError: if T alone is more than the cache's length.
        """
        if tokens.shape[1] > cache.keys.shape[2]:
            raise ValueError(
                f"Expected at most {cache.keys.shape[2]} tokens, the length of the "
                f"cache, got {tokens.shape[1]}."
            )
        slots = cache.filled + jnp.arange(tokens.shape[1])
        positions = jnp.maximum(slots[None] - cache.start[:, None], 0)
        places = jnp.arange(cache.keys.shape[2])
        seen = (places >= cache.start[:, None])[:, None] & (places <= slots[:, None])
        seen = reshard(seen[:, None], SPECS.mask)
        distances = slots[:, None] - places
        window, cap = (
            self.architecture.sliding_window,
            self.architecture.attention_soft_cap,
        )
        transformer = self._transformer(params)
        shared = transformer.shared_inputs(positions)

        # The cache is a carry, not a scanned input, so that XLA updates it in place.
        def layer(carry, scanned):
            x, *cached = carry
            weights, (attributes, index) = scanned

            def attend(q, k, v, sliding=True):
                at = (index, 0, cache.filled, 0, 0)
                keys, values = (
                    jax.lax.dynamic_update_slice(old, new[None], at)
                    for old, new in zip(cached, (k, v), strict=True)
                )
                reach = reach_of(window, sliding, len(places))
                mask = seen if reach is None else seen & (distances < reach)
                out = attention(q, keys[index], values[index], mask, soft_cap=cap)
                return out, (keys, values)

            x, cached = self._layer(weights)(x, shared, attributes, attend)
            return (x, *cached), None

        x = transformer.embed_tokens(transformer.table(), tokens, positions)
        indices = jnp.arange(self.architecture.num_layers)
        attributes = transformer.layer_attributes(), indices
        carry = x, cache.keys, cache.values
        for layers in _with_weights(params["layers"], attributes):
            carry, _ = jax.lax.scan(layer, carry, layers)
        x, keys, values = carry
        filled = cache.filled + tokens.shape[1]
        cache = dataclasses.replace(cache, keys=keys, values=values, filled=filled)
        return transformer.final_norm(x), cache


def _stacks(layers: Any) -> tuple[Params, ...]:
    return layers if isinstance(layers, tuple) else (layers,)


def _num_layers(stack: Params) -> int:
    return jax.tree.leaves(stack)[0].shape[0]


def _with_weights(layers: Any, attributes: Any) -> list[tuple[Params, Any]]:
    """Each stack of layers with its part of the attributes [L, ...] of all layers."""
    found, start = [], 0
    for stack in _stacks(layers):
        stop = start + _num_layers(stack)
        part = lambda x, start=start, stop=stop: x[start:stop]
        found.append((stack, jax.tree.map(part, attributes)))
        start = stop
    return found


def build(architecture: Architecture, numerics: Numerics = FLOAT32) -> Model:
    """The model of an architecture; it holds no arrays."""
    return Model(architecture, numerics)
