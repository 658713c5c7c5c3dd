"""Objectives: from a loss to a gradient.

An objective is a pair `(init, gradient)` that the train step calls without knowing
which one it is:

    gradient(scores, params, batch, state) -> (gradients, state, metrics)

`from_loss` makes one from any per-pair loss of `jaxpref.losses`.  The mathematics of
noise and of gradient mixing lives in their rooms; here it meets a model and a batch.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import losses
from jaxpref.data.batch import PreferenceBatch
from jaxpref.errors import InputError
from jaxpref.sharding import replicated
from jaxpref.train.rewards import averages_tokens, reward_metrics
from jaxpref.train.scores import PROVIDED, Scores, pair_arrays, without_side


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a run makes small, and how its gradient is found."""

    name: str
    """The loss's name, for `config.json` and messages."""
    options: Mapping[str, Any]
    """The loss's hyper-parameters, defaults filled in."""
    reads: tuple[str, ...]
    """Names of the arrays the loss takes, in its order; see `scores.PROVIDED`."""
    init: Callable[[], Any]
    """`init() -> state`."""
    gradient: Callable[..., tuple[Any, Any, dict[str, jax.Array]]]
    """`gradient(scores, params, batch, state) -> (gradients, state, metrics)`, where
    `scores(params, batch without its A axis)` gives a model's `Scores`."""
    losses: Callable[[Scores, PreferenceBatch, Any], jax.Array]
    """`losses(scores, batch, state) -> [..., S]`; one a pair, 0 in empty slots."""
    count: Callable[[PreferenceBatch], jax.Array]
    """`count(batch)`: what a sum of losses is divided by, over the global batch."""
    metrics: Callable[[Scores, PreferenceBatch], dict[str, jax.Array]]
    """`metrics(scores, batch)`: see `reward_metrics`."""

    @property
    def sides(self) -> int:
        """K: 2 for losses of pairs, 1 where only the chosen completion is read."""
        return 2 if any("rejected" in name for name in self.reads) else 1

    @property
    def needs(self) -> frozenset[str]:
        """The scores it reads, named without their sides."""
        names = (without_side(name) for name in self.reads)
        return frozenset(name for name in names if name in PROVIDED)

    @property
    def needs_reference(self) -> bool:
        """Whether it reads anything of a reference model."""
        return self.needs_live_reference or bool(self.stored)

    @property
    def needs_live_reference(self) -> bool:
        """Whether the reference's weights must stay: it reads whole distributions."""
        return "kls" in self.needs

    @property
    def stored(self) -> frozenset[str]:
        """The scores of the reference that are computed once, before training."""
        if self.needs_live_reference:
            return frozenset()
        return frozenset(name for name in self.needs if name.startswith("reference_"))


def trainable(loss: Callable) -> bool:
    """Whether everything a loss reads can be computed of a batch of pairs."""
    reads = _reads(loss)
    return "policy_chosen_logps" in reads and all(
        without_side(name) in PROVIDED for name in reads
    )


def from_loss(loss: Callable[..., jax.Array], **options) -> Objective:
    """The objective "mean of `loss` over the pairs of the global batch".

    Micro-batches add their sums and the total is divided by the number of pairs of the
    whole batch, so the result does not depend on accumulation, processes or mesh.  A
    loss that couples the pairs of a batch (it takes `where`) sees the whole of it: with
    more than one micro-batch, log-probs are computed a first time without gradients.

    Args:
      loss: a per-pair loss; its positional parameter names say which arrays it reads.
      **options: its hyper-parameters.

    Raises:
      InputError: if an option is unknown to the loss, missing, or out of its range.
    """
    return _mean_of(loss, options, _pairs)


def sft() -> Objective:
    """Supervised fine-tuning: mean negative log-likelihood of the completion tokens."""
    tokens = lambda batch: jnp.sum(batch.completion_lengths[..., 0])
    return _mean_of(losses.sft, {}, tokens)


def beta_dpo(
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    drop_rate: float = 0.2,
    momentum: float = 0.9,
) -> Objective:
    """beta-DPO: a beta that follows the batch, and unusual pairs left out of it.

    Its state is the moving mean and standard deviation of the margins, and the number
    of batches, which the random choice of each batch depends on.

    Args:
      beta: the beta of a batch whose margins are as usual, > 0.
      alpha: how far beta follows the batch, per nat of margin, >= 0.
      drop_rate: the part of a batch's pairs that is left out, in [0, 1).
      momentum: the part of the moving moments that stays, in [0, 1].

    Raises:
      InputError: if an option is out of its range.
    """
    if not 0 <= drop_rate < 1:
        raise InputError(f"loss beta_dpo: drop_rate {drop_rate}: must be in [0, 1)")
    if not 0 <= momentum <= 1:
        raise InputError(f"loss beta_dpo: momentum {momentum}: must be in [0, 1]")

    def init():
        moments = {"running_mean": np.float32(0), "running_std": np.float32(0)}
        return moments | {"batches": np.int32(0)}

    def prepare(arrays, where, state):
        chosen = arrays["policy_chosen_logps"] - arrays["reference_chosen_logps"]
        rejected = arrays["policy_rejected_logps"] - arrays["reference_rejected_logps"]
        margins = chosen - rejected
        mean, std = losses.margin_moments(
            margins,
            state["running_mean"],
            state["running_std"],
            momentum=momentum,
            where=where,
        )
        key = jax.random.fold_in(jax.random.key(0), state["batches"])
        selected = losses.beta_dpo_selection(
            margins, mean, std, key, drop_rate=drop_rate, where=where
        )
        batches = state["batches"] + 1
        return selected, {"running_mean": mean, "running_std": std, "batches": batches}

    objective = _mean_of(
        losses.beta_dpo,
        {"beta": beta, "alpha": alpha},
        _pairs,
        init=init,
        prepare=prepare,
    )
    own = {"drop_rate": drop_rate, "momentum": momentum}
    return dataclasses.replace(objective, options=dict(objective.options) | own)


Prepare = Callable[[dict, jax.Array, Any], tuple[jax.Array, Any]]
"""`(arrays, where, state) -> (where, state)`: before a training step of a loss with
running statistics, which pairs it sees and the statistics it leaves behind."""


def _mean_of(
    loss: Callable[..., jax.Array],
    options: Mapping[str, Any],
    count: Callable[[PreferenceBatch], jax.Array],
    *,
    init: Callable[[], Any] = dict,
    prepare: Prepare | None = None,
) -> Objective:
    reads = _reads(loss)
    _check(loss, options, init())
    coupled = "where" in inspect.signature(loss).parameters
    defaults = {
        p.name: p.default
        for p in inspect.signature(loss).parameters.values()
        if p.kind == p.KEYWORD_ONLY and p.name != "where"
    }
    options = defaults | dict(options)

    @functools.cache
    def per_token() -> bool:
        # Not before a run has joined its processes: it touches a device.
        with jax.ensure_compile_time_eval():
            return averages_tokens(loss, reads, options, init())

    def metrics(scores, batch):
        return reward_metrics(scores, batch, per_token(), options)

    def pair_losses(scores, batch, state, where=None):
        arrays = pair_arrays(reads, scores, batch, state)
        real = batch.pairs >= 0
        where = real if where is None else where
        coupling = {"where": where} if coupled else {}
        values = loss(*arrays.values(), **options, **coupling)
        if prepare is not None:
            # The mean over the pairs it sees, whatever the sum is divided by.
            values *= jnp.sum(real) / jnp.maximum(jnp.sum(where), 1)
        return jnp.where(where, values * batch.weights, 0.0)

    def slopes(scores, batch, state):
        """The summed losses' slopes in the scores, the losses, and the next state."""
        where = batch.pairs >= 0
        following = state
        if prepare is not None:
            arrays = pair_arrays(reads, scores, batch, state)
            where, following = prepare(arrays, where, state)

        def summed(scores):
            values = pair_losses(scores, batch, following, where)
            return jnp.sum(values), values

        cotangents, values = jax.grad(summed, has_aux=True)(scores)
        return cotangents, values, following

    def gradient(scores, params, batch, state):
        ahead = own = None
        if coupled and len(batch.pairs) > 1:
            # All pairs must have their log-probs before one of them has a gradient.
            first = jax.lax.map(lambda micro: scores(params, micro), batch)
            ahead, values, following = slopes(first, batch, state)

        def backward(total, xs):
            micro, cotangents = xs
            out, pull = jax.vjp(lambda p: scores(p, micro), params)
            own = None
            if cotangents is None:
                cotangents, *own = slopes(out, micro, state)
            (grads,) = pull(cotangents)
            return jax.tree.map(jnp.add, total, grads), (out, own)

        # Summed in float32 or wider, whatever the parameters are kept in.
        wide = lambda p: jnp.promote_types(p.dtype, jnp.float32)
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, wide(p)), params)
        total, (out, own) = jax.lax.scan(backward, zeros, (batch, ahead))
        if ahead is None:
            values, states = own
            # One micro-batch, or one state for all: a plain loss leaves it as it was.
            following = jax.tree.map(lambda x: x[0], states)
        divisor = jnp.maximum(count(batch), 1)
        mean = lambda g, p: (g / divisor.astype(g.dtype)).astype(p.dtype)
        grads = jax.tree.map(mean, total, params)
        bad = jnp.where(jnp.isfinite(values), -1, batch.pairs)
        found = {
            "loss": jnp.sum(values) / divisor,
            "nonfinite_pairs": replicated(bad),
        }
        return grads, following, found | metrics(out, batch)

    return Objective(
        name=loss.__name__,
        options=options,
        reads=reads,
        init=init,
        gradient=gradient,
        losses=pair_losses,
        count=count,
        metrics=metrics,
    )


def _pairs(batch: PreferenceBatch) -> jax.Array:
    return jnp.sum(batch.pairs >= 0)


def _reads(loss: Callable) -> tuple[str, ...]:
    parameters = inspect.signature(loss).parameters.values()
    return tuple(p.name for p in parameters if p.kind != p.KEYWORD_ONLY)


def _check(loss: Callable, options: Mapping[str, Any], state) -> None:
    """Traces the loss, so that a bad option is found before any model is loaded."""
    pair = jax.ShapeDtypeStruct((1,), jnp.float32)
    reads = _reads(loss)
    try:
        if "where" in options:
            raise TypeError("where is the engine's: it masks empty slots")
        jax.eval_shape(
            functools.partial(loss, **options),
            *(state.get(name, pair) for name in reads),
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"loss {loss.__name__}: {error}") from error
