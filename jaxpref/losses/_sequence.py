"""From token log-probs to completion log-probs."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["sum_by_completion"]


def sum_by_completion(
    token_logps: Float[Array, "*rows sequences predictions"],
    completions: Int[Array, "*rows sequences predictions"],
    *,
    num_completions: int,
) -> Float[Array, "*rows completions"]:
    """Sums the token log-probs of each completion of a row.

        out[..., c] = sum of token_logps[..., q, p] where completions[..., q, p] == c

    Summed by comparison, not by scatter, so it works under any sharding of the leading
    axes: a completion never leaves its row.  Padding is dropped before the sum, so what
    it holds (NaN included) does not matter.

    Args:
      token_logps: log-prob of each target token, nats; [*rows, Q, P].
      completions: index of the completion that each target belongs to, below
        `num_completions`; -1 where the position is padding; [*rows, Q, P].
      num_completions: completions of a row, counting empty ones; static.

    Returns:
      Summed log-probs, [*rows, num_completions], at least float32; 0 where a completion
      has no token.

    Raises:
      TypeError: if `token_logps` is not floating point or `completions` not integer.
      ValueError: if shapes differ, have less than two axes, or `num_completions` < 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import sum_by_completion
      >>> logps = jnp.array([[-1.0, -2.0, -4.0], [-8.0, -16.0, 0.0]])
      >>> owner = jnp.array([[0, 0, 1], [1, 1, -1]])
      >>> print(sum_by_completion(logps, owner, num_completions=3))
      [ -3. -28.   0.]
    """
    token_logps, completions = jnp.asarray(token_logps), jnp.asarray(completions)
    if not jnp.issubdtype(token_logps.dtype, jnp.floating):
        raise TypeError(
            f"Expected token_logps to be floating point, got {token_logps.dtype}."
        )
    if not jnp.issubdtype(completions.dtype, jnp.integer):
        raise TypeError(f"Expected completions to be integer, got {completions.dtype}.")
    if token_logps.shape != completions.shape or token_logps.ndim < 2:
        raise ValueError(
            "Expected two arrays of one shape [..., Q, P], got "
            f"token_logps {token_logps.shape}, completions {completions.shape}."
        )
    if num_completions < 1:
        raise ValueError(f"Expected num_completions >= 1, got {num_completions}.")
    dtype = jnp.promote_types(token_logps.dtype, jnp.float32)
    # [..., Q, P, C] exists on paper only: XLA fuses the comparison into the sum.
    index = jnp.arange(num_completions, dtype=completions.dtype)
    index = index.reshape((1,) * completions.ndim + (num_completions,))
    own = completions[..., None] == index
    return jnp.sum(
        jnp.where(own, token_logps.astype(dtype)[..., None], 0), axis=(-3, -2)
    )
