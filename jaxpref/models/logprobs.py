"""Log-probs of given tokens, without logits for the whole sequence.

The head runs only on positions that predict a target, `chunk_size` of them at a time:
the largest arrays with a vocabulary axis, besides the head and its gradient, are
`[B, chunk_size, V]`.  The backward pass recomputes each chunk's logits.  If there is a
single chunk and only log-probs are requested, its logits are saved instead, and the
head then costs three products instead of four.

Axes: B rows, T tokens, P predicted positions, c positions of a chunk, D hidden,
V vocabulary, N row groups (see `gathering`).
"""

import dataclasses
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.models.layout import SPECS, num_parts, reshard
from jaxpref.models.linear import dense_einsum
from jaxpref.sharding import ROWS

Hidden = Float[Array, "B T D"]
Head = Float[Array, "*N D V"]
Positions = Int[Array, "B P"]
PerPosition = Float[Array, "B P"]


def project(hidden: Hidden, head: Head) -> Float[Array, "B T V"]:
    """Logits before a soft cap: hidden @ head.

    The factors are in the dtype of `hidden`, the sums in float32 or wider; V is sharded
    over the `tensor` axis of the mesh.  With a head [N, D, V], each of the N row groups
    uses its own copy; see `gathering`.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    spec = SPECS.features
    return dense_einsum("btd,dv->btv", hidden, head, spec=spec, out_dtype=wide)


def logits(
    hidden: Hidden, head: Head, soft_cap: float | None = None
) -> Float[Array, "B T V"]:
    """Logits z = hidden @ head in float32 or wider, or soft_cap tanh(z / soft_cap).

    Source: Gemma Team 2024, arXiv:2408.00118, section 2.
    """
    z = project(hidden, head)
    if soft_cap is None:
        return z
    if not soft_cap > 0:
        raise ValueError(f"soft_cap {soft_cap}: must be above 0; None for no cap")
    return soft_cap * jnp.tanh(z / soft_cap)


CHUNK_BYTES = 2**28
"""Default size of a chunk's logits on one device.  It is at least the size of the
head's gradient, which is in memory at the same time in any case."""


def token_logps(
    hidden: Hidden,
    head: Head,
    predictors: Positions,
    targets: Positions,
    *,
    chunk_size: int | None = None,
    soft_cap: float | None = None,
) -> PerPosition:
    """Log-prob in nats of each target under the state that predicts it.

    out[b, p] = log_softmax(hidden[b, predictors[b, p]] @ head)[targets[b, p]]

    Args:
        hidden: the final hidden states.
        head: [D, V], or [N, D, V] with one copy per row group.  Keep it in the
            parameter dtype: its gradient is summed over chunks in that dtype; the
            factors are in the dtype of `hidden`.
        predictors: positions whose hidden state predicts each target.
        targets: the predicted tokens.
        chunk_size: maximum predicted positions of each row in a chunk; by default
            `default_chunk`.
        soft_cap: of the logits; see `logits`.

    Returns:
        Log-probs, float32 (float64 for float64 hidden states).  Unused positions have
        arbitrary finite values: mask them when summing.
    """

    def chunk(t, h):
        z = logits(h, head, soft_cap)
        return (_logps(z, t),)

    (logps,) = _over_chunks(
        chunk, predictors, targets, (hidden,), head, chunk_size, save_single_chunk=True
    )
    return logps


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A number for each predicted token, from the logits of one or more models."""

    name: str
    of: Callable[..., Float[Array, "B c"]]
    """`of(z [B, c, V], targets [B, c], others)`; others are logits [B, c, V] by model.
    """
    models: tuple[str, ...] = ()
    """Names of the other models whose logits it reads."""


def _collisions(z, t, others):
    """The log-probability that two samples are the same token: log sum_v pi(v)^2."""
    del t, others
    return jax.nn.logsumexp(2 * z, axis=-1) - 2 * jax.nn.logsumexp(z, axis=-1)


def _entropies(z, t, others):
    """Entropy in nats: - sum_v pi(v) log pi(v)."""
    del t, others
    log_p = z - jax.nn.logsumexp(z, axis=-1, keepdims=True)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def _kls(z, t, others):
    """KL(reference || policy) in nats: sum_v ref(v) (log ref(v) - log pi(v))."""
    del t
    reference_z = others[REFERENCE]
    log_p = z - jax.nn.logsumexp(z, axis=-1, keepdims=True)
    log_r = reference_z - jax.nn.logsumexp(reference_z, axis=-1, keepdims=True)
    return jnp.sum(jnp.exp(log_r) * (log_r - log_p), axis=-1)


REFERENCE = "reference"
"""The name of the reference among the other models."""

STATISTICS = {
    statistic.name: statistic
    for statistic in (
        Statistic("logps", lambda z, t, others: _logps(z, t)),
        Statistic("collisions", _collisions),
        Statistic("entropies", _entropies),
        Statistic("kls", _kls, (REFERENCE,)),
        Statistic(
            "reference_logps",
            lambda z, t, others: _logps(others[REFERENCE], t),
            (REFERENCE,),
        ),
    )
}
"""Statistics that any model has, by name."""


def token_statistics(
    names: Collection[str],
    hidden: Hidden,
    head: Head,
    predictors: Positions,
    targets: Positions,
    *,
    others: Mapping[str, tuple[Hidden, Head]] = types.MappingProxyType({}),
    among: Mapping[str, Statistic] = types.MappingProxyType(STATISTICS),
    chunk_size: int | None = None,
    soft_cap: float | None = None,
) -> dict[str, Float[Array, "B P"]]:
    """Several statistics of each target, from one pass over the logits.

    Args:
        names: which statistics.
        hidden: [B, T, D], as for `token_logps`, like all arguments not listed here.
        head: [D, V] or [N, D, V].
        predictors: int [B, P].
        targets: int [B, P].
        others: hidden states and heads of the other models that a statistic reads.
        among: the statistics by name.
        chunk_size: see `token_logps`.
        soft_cap: see `token_logps`.

    Returns:
        Name -> [B, P], float32 or wider.
    """
    if set(names) == {"logps"}:
        logps = token_logps(
            hidden, head, predictors, targets, chunk_size=chunk_size, soft_cap=soft_cap
        )
        return {"logps": logps}
    wanted = [among[name] for name in names]
    # In a fixed order, so that every process compiles the same program.
    models = sorted({model for statistic in wanted for model in statistic.models})

    def chunk(t, h, *others_h):
        z = logits(h, head, soft_cap)
        other_z = {
            model: logits(other_h, others[model][1], soft_cap)
            for model, other_h in zip(models, others_h, strict=True)
        }
        return {statistic.name: statistic.of(z, t, other_z) for statistic in wanted}

    hiddens = (hidden, *(others[model][0] for model in models))
    return _over_chunks(chunk, predictors, targets, hiddens, head, chunk_size)


def _logps(z: jax.Array, t: jax.Array) -> jax.Array:
    # Selected by comparison and not by a gather, so that V can be sharded.
    tokens = reshard(jnp.arange(z.shape[-1]), SPECS.vocabulary)
    chosen = tokens == t[..., None]
    z_t = jnp.sum(jnp.where(chosen, z, 0), axis=-1)
    return z_t - jax.nn.logsumexp(z, axis=-1)


def _over_chunks(
    function: Callable,
    predictors: Positions,
    targets: Positions,
    hiddens: tuple[Hidden, ...],
    head: Head,
    chunk_size: int | None,
    save_single_chunk: bool = False,
) -> Any:
    """`function(targets [B, c], *hiddens [B, c, D])` over P, chunk by chunk.

    `save_single_chunk`: if there is a single chunk, its backward pass recomputes
    nothing.
    """
    B, P = targets.shape
    chunks = max(-(-P // (chunk_size or _chunk_size(B, head))), 1)
    chunk_size = max(-(-P // chunks), 1)  # one unused position if P = 0
    padding = ((0, 0), (0, chunks * chunk_size - P))
    predictors = jnp.pad(reshard(predictors, SPECS.tokens), padding)
    targets = jnp.pad(reshard(targets, SPECS.tokens), padding)
    # Under vmap, a gather within a row needs no sharding annotation.
    at_predictors = lambda hidden: jax.vmap(lambda h, i: h[i])(
        reshard(hidden, SPECS.hidden), predictors
    )
    split = lambda a: jnp.moveaxis(a.reshape(B, -1, chunk_size, *a.shape[2:]), 1, 0)
    join = lambda a: jnp.moveaxis(a, 0, 1).reshape(B, -1)[:, :P]
    if chunks == 1 and save_single_chunk:
        outs = function(targets, *(at_predictors(h) for h in hiddens))
        return jax.tree.map(lambda a: a[:, :P], outs)
    checkpointed = jax.checkpoint(function)
    _, outs = jax.lax.scan(
        lambda carry, xs: (carry, checkpointed(*xs)),
        None,
        (split(targets), *(split(at_predictors(h)) for h in hiddens)),
    )
    return jax.tree.map(join, outs)


def _chunk_size(B: int, head: Head) -> int:
    rows = -(-B // num_parts(ROWS))
    vocabulary = -(-head.shape[-1] // num_parts(("tensor",)))
    return default_chunk(rows, head.shape[-2], vocabulary)


def default_chunk(rows: int, width: int, vocabulary: int) -> int:
    """Predicted positions per row in a chunk; see `CHUNK_BYTES`.

    Args:
        rows: rows on one device.
        width: hidden size.
        vocabulary: vocabulary entries on one device.
    """
    bytes_per_position = 4 * rows * vocabulary
    return max(CHUNK_BYTES // bytes_per_position, width // rows, 1)
