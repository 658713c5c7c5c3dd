"""Log-probs of given tokens, without logits for the whole sequence."""

import jax
import jax.numpy as jnp

from jaxpref.models.config import SPECS, on_mesh, place


def project(hidden, head) -> jax.Array:
    """Logits [B, T, V] = hidden [B, T, D] @ head [D, V], in float32 or wider.

    The factors are in the dtype of `hidden`, the sums in float32 or wider; V is spread
    over the `tensor` axis of the mesh.
    """
    return jnp.einsum(
        "btd,dv->btv",
        hidden,
        head.astype(hidden.dtype),
        preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32),
        out_sharding=on_mesh(SPECS.features),
    )


def token_logps(hidden, head, predictors, targets, *, chunk_size: int) -> jax.Array:
    """Log-prob in nats of each target under the state that predicts it.

    out[b, p] = log_softmax(hidden[b, predictors[b, p]] @ head)[targets[b, p]]

    The head runs on the predictor positions only, `chunk_size` of them at a time, and
    the backward pass computes each chunk's logits again: the largest array with a
    vocabulary axis, besides the head and its gradient, is [B, chunk_size, V].  The
    target's logit is selected by comparison and not by a gather, so V may be sharded
    over `tensor`.

    Args:
        hidden: [B, T, D], the final hidden states.
        head: [D, V].  Keep it in the parameter dtype: its gradient is summed over
            chunks in that dtype; the factors are in the dtype of `hidden`.
        predictors: int [B, P], positions whose hidden state predicts each target.
        targets: int [B, P], the predicted tokens.
        chunk_size: predicted positions of every row in one chunk; P is padded to a
            multiple of it.

    Returns:
        Log-probs [B, P], float32 (float64 for float64 hidden states).  Unused places
        hold some finite number: mask them when summing.
    """
    B, P = targets.shape
    chunk_size = min(chunk_size, P)
    padding = ((0, 0), (0, -P % chunk_size))
    predictors = jnp.pad(place(predictors, SPECS.tokens), padding)
    targets = jnp.pad(place(targets, SPECS.tokens), padding)
    hidden = place(hidden, SPECS.hidden)
    # A gather within its own row: under vmap it needs no annotation.
    hidden = jax.vmap(lambda h, i: h[i])(hidden, predictors)

    @jax.checkpoint
    def chunk(h, t):
        z = project(h, head)
        chosen = jnp.arange(z.shape[-1]) == t[..., None]
        z_t = jnp.sum(jnp.where(chosen, z, 0), axis=-1)
        return z_t - jax.nn.logsumexp(z, axis=-1)

    split = lambda a: jnp.moveaxis(a.reshape(B, -1, chunk_size, *a.shape[2:]), 1, 0)
    _, logps = jax.lax.scan(
        lambda carry, xs: (carry, chunk(*xs)), None, (split(hidden), split(targets))
    )
    return jnp.moveaxis(logps, 0, 1).reshape(B, -1)[:, :P]
