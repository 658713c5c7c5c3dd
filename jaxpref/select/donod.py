"""DONOD: how a gradient step on a sample changes the norm of the LM head."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpref.models import Model
from jaxpref.models.layout import SPECS, on_mesh, reshard
from jaxpref.models.logprobs import logits

Params = Any
Batch = Any
"""A `PreferenceBatch` of a program's arrays, without the axis of micro-batches."""


def head_gradient_norms(
    model: Model, params: Params, batch: Batch
) -> Float[Array, "R 2"]:
    r"""The norm of the head's gradient, and its part along the head, of each row.

    For a sample's loss L, the mean negative log-probability of the answer's tokens, and
    G = dL/dW with the LM head W,

        norm_of_delta = ||G||,    delta_of_norm = -<W, G> / ||W||

    These are ||W' - W|| and ||W'|| - ||W|| for a gradient step W' = W - lr G, divided
    by lr, for a small lr.  G is never made: with the states h_p that predict the |y|
    tokens, and the gradients g_p of L by their logits,

        ||G||^2 = sum_pq (h_p . h_q) (g_p . g_q),    <W, G> = sum_p z_p . g_p

    where z are the logits before a soft cap.  Of a head that is the embedding, only the
    gradient as the head counts.

    Args:
      model: the model.
      params: its parameters.
      batch: one completion per row.

    Returns:
      [R, 2]: norm_of_delta and delta_of_norm, float32.

    References:
      Hu et al., "DONOD: Efficient and Generalizable Instruction Fine-Tuning for LLMs
      via Model-Intrinsic Dataset Pruning", 2025, arXiv:2504.14810.
    """
    tokens, predictors = batch.tokens[:, 0], batch.predictors[:, 0]
    hidden = reshard(model.hidden(params, tokens), SPECS.hidden)
    # Under vmap, a gather within a row needs no sharding annotation.
    states = jax.vmap(lambda h, p: h[p])(hidden, reshard(predictors, SPECS.tokens))
    head = model.head(params)
    cap = model.architecture.logit_soft_cap
    raw = logits(states, head)
    capped = raw if cap is None else cap * jnp.tanh(raw / cap)
    size = jnp.maximum(batch.completion_lengths[:, 0, 0], 1)
    used = (batch.completions[:, 0] >= 0) / size[:, None]
    vocabulary = reshard(jnp.arange(raw.shape[-1]), SPECS.vocabulary)
    label = vocabulary == batch.targets[:, 0][..., None]
    gradients = (jax.nn.softmax(capped, axis=-1) - label) * used[..., None]
    if cap is not None:
        gradients = gradients * (1 - jnp.square(capped / cap))
    rows = on_mesh(SPECS.hidden)
    wide = states.astype(jnp.float32)
    common = jnp.einsum("bpd,bqd->bpq", wide, wide, out_sharding=rows)
    gradient_products = jnp.einsum(
        "bpv,bqv->bpq", gradients, gradients, out_sharding=rows
    )
    square = jnp.sum(common * gradient_products, axis=(1, 2))
    along = jnp.sum(raw * gradients, axis=(1, 2))
    norm = jnp.sqrt(jnp.sum(jnp.square(head.astype(jnp.float32))))
    found = jnp.sqrt(jnp.maximum(square, 0)), -along / norm
    return jnp.stack(found, axis=-1).astype(jnp.float32)


def topsis(costs: Float[np.ndarray, "N C"]) -> Float[np.ndarray, " N"]:
    """Closeness to the ideal of samples with several costs, from 0 to 1 (best).

        r = x / ||x|| by column,    closeness = d_worst / (d_best + d_worst)

    with the distances of r to the smallest and the largest value of each column
    (Hwang and Yoon 1981, with equal weights); 1 if all samples are equal.
    """
    costs = np.asarray(costs, np.float64)
    norms = np.linalg.norm(costs, axis=0)
    scaled = costs / np.where(norms > 0, norms, 1)
    to_best = np.linalg.norm(scaled - scaled.min(axis=0), axis=1)
    to_worst = np.linalg.norm(scaled - scaled.max(axis=0), axis=1)
    total = to_best + to_worst
    return np.where(total > 0, to_worst / np.where(total > 0, total, 1), 1.0)
