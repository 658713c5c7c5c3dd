"""The model as pure functions of its parameters; the only file that splits NNX."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxpref.models import logprobs
from jaxpref.models.architecture import Architecture
from jaxpref.models.attention import (
    Segments,
    cached_attention,
    causal_attention,
    packed_attention,
)
from jaxpref.models.cache import Cache, Stack, slots_of, stored
from jaxpref.models.experts import RouterSums, router_sums
from jaxpref.models.layout import SPECS, check_mesh, on_mesh, reshard
from jaxpref.models.linear import PRODUCT
from jaxpref.models.numerics import FLOAT32, Numerics
from jaxpref.models.soft_prompt import PROMPT, Prompted
from jaxpref.models.stacks import (
    Params,
    Run,
    at_layer,
    num_layers,
    stacks_of,
    with_weights,
)
from jaxpref.models.transformer import Attend, Block, Transformer


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
    so a part of a parameter can be trained (see `partition`).  There may also be a
    soft prompt, `prompt` [n, D]: see `soft_prompt`.  The functions work
    without a mesh and under an Explicit mesh with axes `data`, `fsdp`, `tensor` set by
    `jax.set_mesh`; there B must be a multiple of data * fsdp.  For a mixture of
    experts, the mesh may have an axis `expert` after `fsdp`, which also splits the rows
    (B is a multiple of data * fsdp * expert).  A model holds no arrays
    and is hashable: a static argument of `jax.jit`.
    """

    architecture: Architecture
    numerics: Numerics = FLOAT32

    def _transformer(self, params: Params) -> Transformer:
        whole = params | {"layers": stacks_of(params["layers"])[0]}
        whole.pop(PROMPT, None)
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
                `tensor` (or also `expert`), or do not divide the model's sizes.
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
        return self._hidden(params, tokens, positions, segments, lengths)[0]

    def hidden_and_heads(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Segments | None = None,
        lengths: Int[Array, " B"] | None = None,
        counted: Float[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "*N D V"], RouterSums | None]:
        """`hidden`, the LM head for `token_logps`, and what the routers did.

        The head [N, D, V] has one copy for each of the N row groups of the mesh, or is
        [D, V] if there is one.  Training uses it in place of `head`: its gradient is
        summed over devices only once, together with that of a tied embedding.

        The routers' sums are over all layers of a mixture of experts, and over all rows
        of the batch.  `counted` says how often each token counts; None for no sums.
        """
        inputs = tokens, positions, segments, lengths
        hidden, head, kept = self._hidden(params, *inputs, counted=counted)
        return hidden, head(), _over_layers(kept)

    def hidden_head_and_readouts(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Segments | None = None,
        lengths: Int[Array, " B"] | None = None,
        *,
        readout: Callable[[Array, Any], Array],
        heads: Any,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "*N D V"], Float[Array, "L B T n"]]:
        """`hidden`, the LM head, and a readout of the residual stream of each layer.

        The readout is `readout(x [B, T, D], own) -> [B, T, n]`, x after the layer and
        `own` the layer's slice of `heads`, a pytree of arrays [L, ...].
        """
        inputs = tokens, positions, segments, lengths
        hidden, head, kept = self._hidden(params, *inputs, readout=readout, heads=heads)
        return hidden, head(), jnp.concatenate(kept)

    def hidden_and_router(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Segments | None = None,
        *,
        counted: Float[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], RouterSums | None]:
        """As `hidden_and_heads`, without a head."""
        inputs = tokens, positions, segments, None
        hidden, _, kept = self._hidden(params, *inputs, counted=counted)
        return hidden, _over_layers(kept)

    def _hidden(
        self,
        params,
        tokens,
        positions,
        segments,
        lengths,
        keep: bool = False,
        counted: jax.Array | None = None,
        readout: Callable[[Array, Any], Array] | None = None,
        heads: Any = None,
    ) -> tuple[jax.Array, Callable[[], jax.Array], list[Any]]:
        """Final hidden states, the LM head and, of each stack, what `_attend` keeps.

        With `counted`, the sums of the routers instead; with `readout`, what it returns
        of each layer.
        """
        transformer = self._transformer(params)
        table = transformer.table()
        head = functools.partial(transformer.heads, table)
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        else:
            positions = reshard(positions, SPECS.tokens)
        shared = transformer.shared_inputs(positions)
        attend = self._attend(segments, positions, lengths, keep)

        experts: Any = self.architecture

        def layer(x, weights_and_attributes):
            weights, attributes = weights_and_attributes
            block: Any = self._layer(weights)
            if counted is None:
                return block(x, shared, attributes, attend)
            x, _, p = block.routed(x, shared, attributes, attend)
            return x, router_sums(p, counted, per_token=experts.experts_per_token)

        layer = _remat(layer, self.numerics.remat)

        def step(x, layers):
            weights, (attributes, own) = layers
            x, state = layer(x, (weights, attributes))
            return x, state if readout is None else readout(x, own)

        if PROMPT in params:
            table = Prompted(table, params[PROMPT])
        x = transformer.embed_tokens(table, tokens, positions)
        kept = []
        of_layers = transformer.layer_attributes(), heads
        for layers in with_weights(params["layers"], of_layers):
            unroll = min(self.numerics.unroll, num_layers(layers[0]))
            x, states = jax.lax.scan(step, x, layers, unroll=unroll)
            kept.append(states)
        return transformer.final_norm(x), head, kept

    def _attend(
        self, segments: Segments | None, positions, lengths, keep: bool
    ) -> Attend:
        """Attention over whole rows, packed or not; of the latter, it can keep k, v."""
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
            (k, v) if keep else None,
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

    def empty_cache(self, params: Params, batch: int, length: int) -> Cache:
        """A cache for `batch` rows of at most `length` tokens.

        Args:
            params: parameters, or their shapes; the cache has stacks of layers where
                they do.
            batch: B.
            length: the slots of layers without a sliding window.
        """
        a, dtype = self.architecture, self.numerics.compute_dtype

        def zeros(run: "Run") -> jax.Array:
            slots = slots_of(run.window, length)
            shape = (run.count, batch, a.num_kv_heads, slots, a.head_dim)
            return jnp.zeros(shape, dtype, out_sharding=on_mesh(SPECS.cache))

        stacks = tuple(
            Stack(zeros(run), zeros(run), run.window) for run in self._runs(params)
        )
        return Cache(stacks, reshard(jnp.zeros(batch, jnp.int32), SPECS.rows))

    def prefill(
        self, params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """Hidden states of the last tokens of prompts, and the filled cache.

        Args:
            params: parameters.
            tokens: prompts, padded on the right.
            lengths: the number of real tokens in each row, at least 1.

        Returns:
            The states that predict the next tokens, and a cache for rows of at most T
            tokens; see `cache.resized`.
        """
        lengths = reshard(jnp.asarray(lengths, jnp.int32), SPECS.rows)
        inputs = reshard(tokens, SPECS.tokens), None, None, lengths, True
        x, _, kept = self._hidden(params, *inputs)
        stacks = []
        for run in self._runs(params):
            part = slice(run.first, run.first + run.count)
            keys, values = (
                reshard(stored(x[part], lengths, run.window), SPECS.cache)
                for x in kept[run.stack]
            )
            stacks.append(Stack(keys, values, run.window))
        # Under vmap, a gather within a row needs no sharding annotation.
        x = jax.vmap(lambda states, last: states[last][None])(x, lengths - 1)
        return x, Cache(tuple(stacks), lengths)

    def decode(
        self,
        params: Params,
        tokens: Int[Array, " B"],
        cache: Cache,
        active: Bool[Array, " B"],
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """Hidden states of the next token of each row, and the updated cache.

        The caller must stay within the cache: an active row must have fewer tokens than
        there are slots.  Lengths are data, so a step beyond it raises no error.

        Args:
            params: parameters.
            tokens: the next token of each row.
            cache: from `prefill` or `empty_cache`, with the same stacks of layers.
            active: the other rows stay as they are, and their states are meaningless.
        """
        transformer, lengths = self._transformer(params), cache.lengths
        positions = lengths[:, None]
        shared = transformer.shared_inputs(positions)
        attributes = transformer.layer_attributes()
        soft_cap = self.architecture.attention_soft_cap
        tokens = reshard(tokens, SPECS.rows)[:, None]
        x = transformer.embed_tokens(transformer.table(), tokens, positions)
        stacks = []
        for run, stack in zip(self._runs(params), cache.stacks, strict=True):
            weights = stacks_of(params["layers"])[run.stack]

            # The cache is a carry and not a scanned input: XLA updates it in place.
            def layer(carry, n, weights=weights, run=run):
                x, keys, values = carry

                def attend(q, k, v, sliding=True):
                    del sliding  # the same in all layers of a run
                    out, *new = cached_attention(
                        q, k, v, keys, values, n, lengths, soft_cap=soft_cap
                    )
                    return out, new

                block = self._layer(at_layer(weights, run.first + n))
                own = at_layer(attributes, run.start + n)
                x, (keys, values) = block(x, shared, own, attend)
                return (x, keys, values), None

            carry = x, stack.keys, stack.values
            if run.count == 1:
                carry, _ = layer(carry, 0)
            else:
                carry, _ = jax.lax.scan(layer, carry, jnp.arange(run.count))
            x, keys, values = carry
            stacks.append(Stack(keys, values, run.window))
        lengths = lengths + reshard(active, SPECS.rows)
        return transformer.final_norm(x), Cache(tuple(stacks), lengths)

    def _runs(self, params: Params) -> list["Run"]:
        """The runs of layers of one kind, within the stacks of the parameters."""
        a = self.architecture
        sliding = a.sliding_layers or (True,) * a.num_layers
        windows = [a.sliding_window if slides else None for slides in sliding]
        runs, start = [], 0
        for number, stack in enumerate(stacks_of(params["layers"])):
            first, stop = start, start + num_layers(stack)
            for window, group in itertools.groupby(windows[start:stop]):
                count = len(list(group))
                runs.append(Run(number, first - start, first, count, window))
                first += count
            start = stop
        return runs


def _over_layers(kept: list[Any]) -> RouterSums | None:
    """The sums over the layers of all stacks; None if nothing was kept."""
    if kept[0] is None:
        return None
    return jax.tree.map(lambda *stacks: sum(jnp.sum(x, 0) for x in stacks), *kept)


def build(architecture: Architecture, numerics: Numerics = FLOAT32) -> Model:
    """The model of an architecture; it holds no arrays."""
    return Model(architecture, numerics)
