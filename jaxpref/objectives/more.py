"""MORE: files of a reward model's data, weighted by the gradients of its head."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.errors import InputError
from jaxpref.gradients.min_norm import min_norm_shares
from jaxpref.objectives.bound_loss import BoundLoss, Loss, bind
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.learned_noise import wrapping
from jaxpref.objectives.objective import Metrics, Objective, State
from jaxpref.scoring.scores import HeadInputs, scores_read
from jaxpref.sharding import replicated

SCORE = "head_inputs"


def more(
    loss: Loss, *, normalize: bool = True, sources: Sequence[str] | None = None
) -> Objective:
    """MORE: files weighted by the smallest combination of their gradients.

        loss    = sum_m lambda_m mean of the losses of file m's pairs
        mu      = argmin over the simplex |sum_m mu_m g_m / |g_m||^2
        lambda  = (mu_m / |g_m|) / sum_k (mu_k / |g_k|)

    for the files m of a batch; without `normalize`, lambda is the argmin over the
    simplex of |sum_m lambda_m g_m|^2.  g_m is the gradient of file m's mean loss in the
    last layer of the reward head.  It is the sum of the losses' derivatives in the
    rewards, times what the layer multiplies, so it takes no backward pass of its own.
    The head's gradient g = sum_m lambda_m g_m has <g, g_m> >= 0 for each m, so a small
    step along -g lowers all losses that are not stationary, or it is 0.  A file whose
    gradient is exactly 0, because it has no pairs in the batch, only pairs of weight 0,
    or saturated losses, gets lambda_m = 0 and does not affect the others.

    Shares of the files in `--data` decide how many pairs of each a batch has, not how
    much these count.  Held-out losses are means over pairs.

    Metrics: `more/NAME`, lambda_m of each file: what its mean loss is multiplied by.
    Their sum is 1, or 0 if all gradients are 0.

    Args:
      loss: a pairwise loss of reward models that reads rewards, such as bradley_terry,
        or a `functools.partial` that sets hyperparameters.
      normalize: scale each g_m to length 1 first, so that the direction of g does not
        depend on how long the gradients are.
      sources: different names of the files, two or more, in the order of `--data`.

    Raises:
      InputError: if there are not several files, two have one name, or the loss reads
        no rewards or couples the pairs of a batch.

    References:
      Zeng et al., "On Diversified Preferences of Large Language Model Alignment", 2023,
      arXiv:2312.07401.  dunzeng/MORE, trainer.py, whose gradients are averages with
      weight `alpha`, 0.99 for the step's own; here it is 1.  It multiplies the losses
      by mu, not lambda, with which <g, g_m> can be negative.
    """
    names = tuple(sources or ())
    if len(names) < 2:
        raise InputError(
            f"more: weights several files, but --data names {len(names) or 'none'}; "
            "give two or more"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"more: two files are named {twice[0]}; name each file once")
    bound = bind(loss)
    if "rewards" not in scores_read(bound.reads) or bound.couples_pairs:
        raise InputError(
            f"more: {bound.name} "
            + ("couples the pairs" if bound.couples_pairs else "reads no rewards")
            + "; use a pairwise loss of reward models, such as bradley_terry"
        )

    def shares(inputs: Inputs) -> Array:
        gradients = head_gradients(bound, inputs.constant(), len(names))
        lengths = jnp.linalg.norm(gradients, axis=-1)
        divisors = jnp.where((lengths > 0) & normalize, lengths, 1)
        scaled = gradients / divisors[:, None]
        products = jnp.matmul(scaled, scaled.T, precision="highest")
        # What multiplies a gradient as it is, not the scaled one.
        found = min_norm_shares(products, where=lengths > 0) / divisors
        total = jnp.sum(found)
        return found / jnp.where(total > 0, total, 1)

    def values(inputs: Inputs, state: State) -> Array:
        del state
        own = files(inputs, len(names))
        counts = jnp.sum(own, tuple(range(own.ndim - 1)))
        weights = shares(inputs) * jnp.sum(counts) / jnp.maximum(counts, 1)
        return bound(inputs) * jnp.sum(own * weights, -1)

    def learn(inputs: Inputs, state: State) -> tuple[State, Metrics]:
        found = shares(inputs)
        return state, {f"more/{name}": found[m] for m, name in enumerate(names)}

    objective = wrapping(
        "more",
        bound,
        {"normalize": normalize, "sources": list(names)},
        reads=(*bound.reads, f"chosen_{SCORE}", f"rejected_{SCORE}"),
        losses=values,
        learn=learn,
        evaluate=lambda inputs, state: (bound(inputs), {}),
        couples=(*bound.reads, SCORE),
    )
    return dataclasses.replace(objective, heads=HeadInputs())


def files(inputs: Inputs, count: int) -> Float[Array, "*batch S M"]:
    """1 for the file of each pair, else 0; all 0 in empty slots."""
    source = jnp.asarray(inputs.batch.source)[..., None]
    own = (source == jnp.arange(count)) & inputs.is_pair[..., None]
    return own.astype(jnp.float32)


def head_gradients(bound: BoundLoss, inputs: Inputs, count: int) -> Float[Array, "M D"]:
    """The gradient of each file's mean loss in the head's last layer.

    A reward is <f, w>, with f what the layer w multiplies.  So the gradient of a pair's
    loss in w is the sum over its answers of dloss/dreward f.

    Args:
      bound: the loss.
      inputs: a batch, with the scores "rewards" and "head_inputs".
      count: M, the number of files.

    Returns:
      The gradients; 0 for a file without pairs.
    """

    def total(rewards: Array) -> Array:
        scores = {**inputs.scores, "rewards": rewards}
        losses = bound(Inputs(scores, inputs.batch)) * inputs.batch.weights
        return jnp.sum(jnp.where(inputs.is_pair, losses, 0))

    residuals = jax.grad(total)(inputs.scores["rewards"])
    # Few numbers: whole on every device, they can be summed in any layout.
    flat = lambda x, axes: jnp.reshape(replicated(x), (-1, *x.shape[x.ndim - axes :]))
    own = flat(files(inputs, count), 1)
    features = flat(inputs.scores[SCORE], 2).astype(jnp.float32)
    sums = jnp.einsum(
        "nm,nk,nkd->md", own, flat(residuals, 1), features, precision="highest"
    )
    return sums / jnp.maximum(jnp.sum(own, 0), 1)[:, None]
