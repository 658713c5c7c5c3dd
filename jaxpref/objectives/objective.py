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
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref import losses
from jaxpref.data.batch import PreferenceBatch
from jaxpref.data.labels import LABELS
from jaxpref.errors import InputError
from jaxpref.scoring.reward_metrics import averages_tokens, reward_metrics
from jaxpref.scoring.scores import PROVIDED, Scores, pair_arrays, without_side
from jaxpref.sharding import replicated


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a run makes small, and how its gradient is found."""

    name: str
    """The loss's name, for `config.json` and messages."""
    options: Mapping[str, Any]
    """The loss's hyper-parameters, defaults filled in."""
    reads: tuple[str, ...]
    """Names of the arrays the loss takes, in its order; see `scores.PROVIDED`."""
    init: Callable[[int], Any]
    """`init(number of known annotators) -> state`."""
    gradient: Callable[..., tuple[Any, Any, dict[str, jax.Array]]]
    """`gradient(scores, params, batch, state) -> (gradients, state, metrics)`, where
    `scores(params, batch without its A axis)` gives a model's `Scores`."""
    losses: Callable[[Scores, PreferenceBatch, Any], jax.Array]
    """`losses(scores, batch, state) -> [..., S]`; one a pair, 0 in empty slots."""
    count: Callable[[PreferenceBatch], jax.Array]
    """`count(batch)`: what a sum of losses is divided by, over the global batch."""
    metrics: Callable[[Scores, PreferenceBatch, Any], dict[str, jax.Array]]
    """`metrics(scores, batch, state)`: see `reward_metrics`, and what it learns."""
    coupled: bool = False
    """Whether a pair's loss depends on the other pairs of its batch."""
    mixes: bool = False
    """Whether it wants batches of pairs with traces and with an empty one; `bvpo`."""

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
    def labels(self) -> frozenset[str]:
        """The numbers it reads of the records; see `data.LabelFields`."""
        return LABELS & set(self.reads)

    @property
    def needs_rewards(self) -> bool:
        """Whether it trains a reward model: it reads scores, not log-probs."""
        return "rewards" in self.needs

    @property
    def trains_two(self) -> bool:
        """Whether the parameters are those of two models; see `peer`."""
        return any(name.startswith("peer_") for name in self.reads)

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


NOT_ALONE = (losses.center_rewards, losses.reward_accuracies, losses.reward_margins)
"""Functions of rewards that teach no order: a penalty beside a loss, and measures."""


def trainable(loss: Callable) -> bool:
    """Whether everything a loss reads can be computed of a batch of pairs."""
    of_pairs = {"policy_chosen_logps", "chosen_rewards"} & set(_reads(loss))
    return bool(of_pairs) and loss not in NOT_ALONE and not _missing(loss)


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
      InputError: if an option is unknown to the loss, missing, or out of its range, or
        the loss reads what is not known of a batch of pairs.
    """
    if missing := _missing(loss):
        raise InputError(
            f"loss {loss.__name__}: reads {', '.join(missing)}, which "
            "a batch of pairs does not have"
        )
    return mean_of(loss, options)


def sft() -> Objective:
    """Supervised fine-tuning: mean negative log-likelihood of the completion tokens."""
    tokens = lambda batch: jnp.sum(batch.completion_lengths[..., 0])
    return mean_of(losses.sft, {}, count=tokens)


def reward_regression() -> Objective:
    """Squared distance of both answers' rewards from their ratings, averaged.

        loss = [(r_w - rating_w)^2 + (r_l - rating_l)^2] / 2

    It reads no order: a flip exchanges the ratings with the answers and changes
    nothing.
    """

    def reward_regression(
        chosen_rewards, rejected_rewards, chosen_ratings, rejected_ratings
    ):
        chosen = losses.reward_regression(chosen_rewards, chosen_ratings)
        rejected = losses.reward_regression(rejected_rewards, rejected_ratings)
        return 0.5 * (chosen + rejected)

    return mean_of(reward_regression, {})


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
      drop_rate: the part of a batch's pairs that is left out, in [0, 1); one stays.
      momentum: the part of the moving moments that stays, in [0, 1].

    Raises:
      InputError: if an option is out of its range.
    """
    if not 0 <= drop_rate < 1:
        raise InputError(f"loss beta_dpo: drop_rate {drop_rate}: must be in [0, 1)")
    if not 0 <= momentum <= 1:
        raise InputError(f"loss beta_dpo: momentum {momentum}: must be in [0, 1]")

    def init(_):
        zero = lambda: jnp.zeros((), jnp.float32)
        batches = jnp.zeros((), jnp.int32)
        return {"running_mean": zero(), "running_std": zero(), "batches": batches}

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
        # One pair stays, however small the batch: without any it would teach nothing.
        all_but_one = 1 - 1 / jnp.maximum(jnp.sum(where), 1)
        dropped = jnp.minimum(drop_rate, all_but_one)
        selected = losses.beta_dpo_selection(
            margins, mean, std, key, drop_rate=dropped, where=where
        )
        batches = state["batches"] + 1
        return selected, {"running_mean": mean, "running_std": std, "batches": batches}

    return mean_of(
        losses.beta_dpo,
        {"beta": beta, "alpha": alpha},
        own={"drop_rate": drop_rate, "momentum": momentum},
        init=init,
        prepare=prepare,
    )


Prepare = Callable[[dict, jax.Array, Any], tuple[jax.Array, Any]]
"""`(arrays, where, state) -> (where, state)`: before a training step of a loss with
running statistics, which pairs it sees and the statistics it leaves behind."""
Learn = Callable[[dict, PreferenceBatch, Any], Any]
"""`(arrays, batch, state) -> state`: what the whole batch, once scored, teaches beside
the model."""
Show = Callable[[dict, PreferenceBatch, Any], dict[str, jax.Array]]
"""`(arrays, batch, state) -> metrics` of what was learnt."""


def _pairs(batch: PreferenceBatch) -> jax.Array:
    return jnp.sum(batch.pairs >= 0)


def mean_of(
    loss: Callable[..., jax.Array],
    options: Mapping[str, Any],
    *,
    own: Mapping[str, Any] = types.MappingProxyType({}),
    count: Callable[[PreferenceBatch], jax.Array] = _pairs,
    init: Callable[[int], Any] = lambda _: {},
    prepare: Prepare | None = None,
    learn: Learn = lambda arrays, batch, state: state,
    show: Show = lambda arrays, batch, state: {},
) -> Objective:
    """The objective "sum of `loss` over the global batch, divided by `count`".

    Args:
      loss: a per-pair loss; its positional parameter names say which arrays it reads.
      options: its hyper-parameters.
      own: hyper-parameters of the objective itself, for the record.
      count: what the sum is divided by.
      init: makes the state of an objective that learns something beside the model.
      prepare: see `Prepare`; only for losses that couple the pairs of a batch.
      learn: see `Learn`.
      show: see `Show`.

    Raises:
      InputError: if an option is unknown to the loss, missing, or out of its range.
    """
    reads = _reads(loss)
    _check(loss, options)
    coupled = "where" in inspect.signature(loss).parameters
    defaults = {
        p.name: p.default
        for p in inspect.signature(loss).parameters.values()
        if p.kind == p.KEYWORD_ONLY and p.name != "where"
    }
    options = defaults | dict(options)

    @functools.cache
    def per_token() -> bool:
        # Not before a run has joined its processes: it touches a device.  It is ours,
        # and not one of the mesh, which may be elsewhere or only described.
        no_mesh = jax.sharding.AbstractMesh((), ())
        with jax.sharding.use_abstract_mesh(no_mesh), jax.ensure_compile_time_eval():
            return averages_tokens(loss, reads, options)

    def metrics(scores, batch, state):
        arrays = pair_arrays(reads, scores, batch, state)
        shown = show(arrays, batch, state)
        return reward_metrics(scores, batch, per_token(), options) | shown

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

    def nonfinite(arrays, values, pairs):
        """The pairs to blame where a loss is not finite, -1 in place of the others."""
        bad = ~jnp.isfinite(values)
        if coupled:
            # One pair may spoil the losses of all: it is the one that came spoilt.
            come = [~jnp.isfinite(x) for x in arrays.values() if x.ndim]
            spoilt = functools.reduce(jnp.logical_or, come) & (pairs >= 0)
            bad = jnp.where(jnp.any(spoilt), spoilt, bad)
        return jnp.where(bad, pairs, -1)

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
        arrays = pair_arrays(reads, out, batch, state)
        found = {
            "loss": jnp.sum(values) / divisor,
            "nonfinite_pairs": replicated(nonfinite(arrays, values, batch.pairs)),
        }
        shown = metrics(out, batch, state)
        following = learn(arrays, batch, following)
        # In the dtypes it began with, whatever the scores have: so it is restored.
        following = jax.tree.map(lambda x, was: x.astype(was.dtype), following, state)
        return grads, following, found | shown

    return Objective(
        name=loss.__name__,
        options=options | dict(own),
        reads=reads,
        init=init,
        gradient=gradient,
        losses=pair_losses,
        count=count,
        metrics=metrics,
        coupled=coupled,
    )


def _reads(loss: Callable) -> tuple[str, ...]:
    parameters = inspect.signature(loss).parameters.values()
    return tuple(p.name for p in parameters if p.kind != p.KEYWORD_ONLY)


def _missing(loss: Callable) -> list[str]:
    """Names of the arrays it reads that are not known of a batch of pairs."""
    unlabelled = [name for name in _reads(loss) if name not in LABELS]
    return [name for name in unlabelled if without_side(name) not in PROVIDED]


def _check(loss: Callable, options: Mapping[str, Any]) -> None:
    """Traces the loss, so that a bad option is found before any model is loaded."""
    scored = {without_side(name) for name in _reads(loss)} & PROVIDED.keys()
    if "rewards" in scored and scored - {"rewards", "lengths"}:
        raise InputError(
            f"loss {loss.__name__}: reads {', '.join(sorted(scored))}; a model has one "
            "head, which gives rewards or log-probs"
        )
    pair = jax.ShapeDtypeStruct((1,), jnp.float32)
    one = jax.ShapeDtypeStruct((), jnp.float32)
    try:
        if "where" in options:
            raise TypeError("where is the engine's: it masks empty slots")
        jax.eval_shape(
            functools.partial(loss, **options),
            *(one if name.startswith("running_") else pair for name in _reads(loss)),
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"loss {loss.__name__}: {error}") from error
