"""From tokens to completions: sums, averages, prefixes, odds, and divergences."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.losses import _common
from jaxpref.losses._common import Lengths, PerPair

__all__ = [
    "average_logps",
    "log_odds",
    "mean_by_completion",
    "of_each_token",
    "sum_by_completion",
    "sum_prefix_by_completion",
    "sum_weighted_by_completion",
    "token_kls",
]

CERTAIN = -1e-6
"""Average log-probs are clipped here: float32 cannot distinguish them from 0."""

TokenValues = Float[Array, "*rows sequences predictions"]
Owners = Int[Array, "*rows sequences predictions"]


def sum_by_completion(
    token_logps: TokenValues, completions: Owners, *, num_completions: int
) -> Float[Array, "*rows completions"]:
    """Sums the token log-probs of each completion of a row.

        out[..., c] = sum of token_logps[..., q, p] where completions[..., q, p] == c

    Uses comparisons instead of a scatter, so it works with any sharding of the leading
    axes, because a completion never spans rows.  Padding is masked before the sum, so
    it may hold anything, even NaN.

    Args:
      token_logps: log-prob of each target token, nats; [*rows, Q, P].
      completions: index of the completion that each target belongs to, below
        `num_completions`; -1 for padding; [*rows, Q, P].
      num_completions: completions per row, including empty ones; static.

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
    (values,) = _common.promoted(token_logps=token_logps)
    return _sum_where(values, owned_tokens(values, completions, num_completions))


def mean_by_completion(
    token_values: TokenValues, completions: Owners, *, num_completions: int
) -> Float[Array, "*rows completions"]:
    """The mean over the tokens of each completion of a row.

        out[..., c] = mean of token_values[..., q, p] where completions[..., q, p] == c

    GRPO's average of a token loss.  `sum_by_completion` over the number of tokens of
    the batch is DAPO's, and over a constant, such as the longest answer, Dr. GRPO's.

    Args:
      token_values: a number for each target token; [*rows, Q, P].
      completions: index of the completion that each target belongs to, below
        `num_completions`; -1 for padding; [*rows, Q, P].
      num_completions: completions per row, including empty ones; static.

    Returns:
      Means, [*rows, num_completions], at least float32; 0 where a completion has no
      token.

    Raises:
      TypeError: if `token_values` is not floating point or `completions` not integer.
      ValueError: if shapes differ, have less than two axes, or `num_completions` < 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import mean_by_completion
      >>> values, owner = jnp.array([[1.0, 3.0, 5.0]]), jnp.array([[0, 0, 1]])
      >>> print(mean_by_completion(values, owner, num_completions=3))
      [2. 5. 0.]

    References:
      Shao et al., "DeepSeekMath", 2024, arXiv:2402.03300, Eq. 3.
    """
    (values,) = _common.promoted(token_values=token_values)
    own = owned_tokens(values, completions, num_completions)
    count = jnp.sum(own, axis=(-3, -2)).astype(values.dtype)
    return _sum_where(values, own) / jnp.maximum(count, 1)


def of_each_token(
    values: Float[Array, "*rows completions"], completions: Owners
) -> TokenValues:
    """The value of the completion that each token belongs to.

        out[..., q, p] = values[..., completions[..., q, p]]

    Such as an advantage of each token, from that of its answer.

    Args:
      values: a number for each completion of a row; [*rows, completions].
      completions: index of the completion that each target belongs to; -1 for padding;
        [*rows, Q, P].

    Returns:
      One value per token, [*rows, Q, P], at least float32; 0 for padding.

    Raises:
      TypeError: if `values` is not floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import of_each_token
      >>> print(of_each_token(jnp.array([2.0, 3.0]), jnp.array([[0, 1, 1, -1]])))
      [[2. 3. 3. 0.]]
    """
    (values,) = _common.promoted(values=values)
    index = jnp.arange(values.shape[-1], dtype=completions.dtype)
    own = completions[..., None] == index
    # Compared with every completion: a gather would need one layout for both arrays.
    return jnp.sum(jnp.where(own, values[..., None, None, :], 0), axis=-1)


def sum_weighted_by_completion(
    token_logps: TokenValues,
    token_weights: TokenValues,
    completions: Owners,
    *,
    num_completions: int,
) -> Float[Array, "*rows completions"]:
    """Sums the token values of each completion, with a weight per token.

        out[..., c] = sum of token_weights token_logps where completions == c

    For token masks, hard or learned: gradients flow into values and weights.  Weights
    of 1 give `sum_by_completion`.  Padding may hold anything in either array.

    Args:
      token_logps: log-prob, log-ratio or KL of each target token; [*rows, Q, P].
      token_weights: weight of each target token; [*rows, Q, P].
      completions: index of the completion that each target belongs to, below
        `num_completions`; -1 for padding; [*rows, Q, P].
      num_completions: completions per row, including empty ones; static.

    Returns:
      Weighted sums, [*rows, num_completions], at least float32; 0 where a completion
      has no token.

    Raises:
      TypeError: if values or weights are not floating point or `completions` not
        integer.
      ValueError: if shapes differ, have less than two axes, or `num_completions` < 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import sum_weighted_by_completion
      >>> logps, weights = jnp.array([[-1.0, -2.0, -4.0]]), jnp.array([[1.0, 0.5, 0.0]])
      >>> owner = jnp.array([[0, 0, 1]])
      >>> print(sum_weighted_by_completion(logps, weights, owner, num_completions=2))
      [-2.  0.]

    References:
      Christopoulou et al., "SparsePO: Controlling Preference Alignment of LLMs via
      Sparse Token Masks", 2024, arXiv:2410.05102, the masked rewards and divergences.
    """
    values, weights = _common.promoted(
        token_logps=token_logps, token_weights=token_weights
    )
    own = owned_tokens(values, completions, num_completions)
    # Mask both before the product: 0 times NaN would be NaN.
    used = jnp.asarray(completions) >= 0
    product = jnp.where(used, values, 0) * jnp.where(used, weights, 0)
    return _sum_where(product, own)


def sum_prefix_by_completion(
    token_logps: TokenValues,
    completions: Owners,
    prefix_lengths: Int[Array, "*rows completions"],
    *,
    num_completions: int,
) -> Float[Array, "*rows completions"]:
    """Sums the token log-probs of the first tokens of each completion.

        out[..., c] = sum over the first prefix_lengths[..., c] tokens of completion c

    The tokens of a completion are counted in the order of the row, sequence by
    sequence.  Prefixes at least as long as the completions give `sum_by_completion`.

    Args:
      token_logps: log-prob of each target token, nats; [*rows, Q, P].
      completions: index of the completion that each target belongs to, below
        `num_completions`; -1 where the position is padding; [*rows, Q, P].
      prefix_lengths: tokens to sum per completion; [*rows, num_completions].
      num_completions: completions of a row, counting empty ones; static.

    Returns:
      Summed log-probs, [*rows, num_completions], at least float32; 0 where no token
      counts.

    Raises:
      TypeError: if `token_logps` is not floating point, or `completions` or
        `prefix_lengths` not integer.
      ValueError: if shapes do not fit or `num_completions` < 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import sum_prefix_by_completion
      >>> logps = jnp.array([[-1.0, -2.0, -4.0], [-8.0, -16.0, 0.0]])
      >>> owner = jnp.array([[0, 0, 0], [1, 1, -1]])
      >>> shorter = jnp.array([2, 2])
      >>> print(sum_prefix_by_completion(logps, owner, shorter, num_completions=2))
      [ -3. -24.]

    References:
      Liu et al., "Length Desensitization in Direct Preference Optimization" (LD-DPO),
      2024, arXiv:2409.06411, the tokens up to the length that both answers share.
    """
    (values,) = _common.promoted(token_logps=token_logps)
    own = owned_tokens(values, completions, num_completions)
    prefix_lengths = jnp.asarray(prefix_lengths)
    if not jnp.issubdtype(prefix_lengths.dtype, jnp.integer):
        raise TypeError(
            f"Expected prefix_lengths to be integer, got {prefix_lengths.dtype}."
        )
    shape = values.shape[:-2] + (num_completions,)
    if prefix_lengths.shape != shape:
        raise ValueError(
            f"Expected prefix_lengths of shape {shape}, got {prefix_lengths.shape}."
        )
    count = own.astype(jnp.int32)
    # The index of each token within its completion: its index within the sequence, plus
    # the tokens in earlier sequences.
    within = jnp.cumsum(count, axis=-2)
    totals = jnp.sum(count, axis=-2)
    earlier = jnp.cumsum(totals, axis=-2) - totals
    nth = within + earlier[..., None, :]
    return _sum_where(values, own & (nth <= prefix_lengths[..., None, None, :]))


def average_logps(logps: PerPair, lengths: Lengths) -> PerPair:
    """Log-probs per token: sums divided by lengths.

        out = log pi(y|x) / |y|

    Args:
      logps: log pi(y|x) summed over completion tokens, nats; [*batch].
      lengths: |y|, completion tokens; 0 counts as 1; [*batch].

    Returns:
      Averages in nats per token, [*batch], at least float32.

    Raises:
      TypeError: if `logps` is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import average_logps
      >>> print(average_logps(jnp.array([-12.0, 0.0]), jnp.array([4, 0])))
      [-3.  0.]
    """
    (logps,) = _common.promoted(logps=logps)
    return _common.per_token(logps, lengths, "lengths")


def log_odds(average_logps: PerPair) -> PerPair:
    """Log-odds of the length-normalized probability of a completion.

        out = log p - log(1 - p),    log p = log pi(y|x) / |y|

    Stable at both ends: log(1 - p) is computed from log p without forming p.  Log-probs
    are clipped at -1e-6, with no gradient above, because the odds diverge there and
    float32 cannot distinguish such log-probs from 0.

    Args:
      average_logps: log-probs per token, see `average_logps`; below 0; [*batch].

    Returns:
      Log-odds, [*batch], at least float32; at most 13.8.

    Raises:
      TypeError: if the array is not floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import log_odds
      >>> odds = jnp.exp(log_odds(jnp.log(jnp.array([0.5, 0.75]))))
      >>> [f"{x:.4f}" for x in odds]
      ['1.0000', '3.0000']

    References:
      Hong, Lee and Thorne, "ORPO: Monolithic Preference Optimization without Reference
      Model", 2024, arXiv:2403.07691, Eq. 4.
    """
    (logps,) = _common.promoted(average_logps=average_logps)
    logps = jnp.minimum(logps, CERTAIN)
    return logps - _log1mexp(logps)


def token_kls(
    policy_log_probs: Float[Array, "*tokens vocabulary"],
    reference_log_probs: Float[Array, "*tokens vocabulary"],
) -> Float[Array, "*tokens"]:
    """KL(ref || pi) at each position, from two arrays of log-probabilities.

        out = sum_v ref(v) (log ref(v) - log pi(v))

    Summed over a completion (`sum_by_completion`), it is the sequential KL divergence
    that token-level losses read.  The expectation is over the reference, not the
    policy.  Tokens that the reference excludes (log-prob -inf) add 0.

    Args:
      policy_log_probs: log pi(v | prefix), normalized, nats; [*tokens, V].
      reference_log_probs: log ref(v | prefix), normalized, nats; [*tokens, V].

    Returns:
      Divergences in nats, [*tokens], at least float32; >= 0 up to rounding.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import token_kls
      >>> policy, reference = jnp.log(jnp.array([0.25, 0.75])), jnp.log(jnp.ones(2) / 2)
      >>> print(f"{token_kls(policy, reference):.4f}")
      0.1438

    References:
      Zeng et al., "Token-level Direct Preference Optimization", 2024, arXiv:2404.11999,
      the sequential KL divergence.
    """
    policy, reference = _common.promoted(
        policy_log_probs=policy_log_probs, reference_log_probs=reference_log_probs
    )
    possible = reference > -jnp.inf
    policy = jnp.where(possible, policy, 0)
    reference = jnp.where(possible, reference, 0)
    terms = jnp.exp(reference) * (reference - policy)
    return jnp.sum(jnp.where(possible, terms, 0), axis=-1)


def _log1mexp(a: jax.Array) -> jax.Array:
    """log(1 - exp(a)) for a < 0, to full precision and with finite gradients."""
    near = a > -0.6931472
    # Each branch gets a safe value where the other one is selected.
    close, far = jnp.where(near, a, -1.0), jnp.where(near, -1.0, a)
    return jnp.where(near, jnp.log(-jnp.expm1(close)), jnp.log1p(-jnp.exp(far)))


def owned_tokens(values: jax.Array, completions, num_completions: int) -> jax.Array:
    """Whether each token belongs to each completion: [*rows, Q, P, C]."""
    completions = jnp.asarray(completions)
    if not jnp.issubdtype(completions.dtype, jnp.integer):
        raise TypeError(f"Expected completions to be integer, got {completions.dtype}.")
    if values.shape != completions.shape or values.ndim < 2:
        raise ValueError(
            "Expected two arrays of one shape [..., Q, P], got "
            f"token_logps {values.shape}, completions {completions.shape}."
        )
    if num_completions < 1:
        raise ValueError(f"Expected num_completions >= 1, got {num_completions}.")
    # [..., Q, P, C] is never materialized: XLA fuses the comparison into the sum.
    index = jnp.arange(num_completions, dtype=completions.dtype)
    index = index.reshape((1,) * completions.ndim + (num_completions,))
    return completions[..., None] == index


def _sum_where(values: jax.Array, own: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(own, values[..., None], 0), axis=(-3, -2))
