"""Label-noise corrections that turn any pairwise loss into a robust one.

Each correction calls the loss twice: on the pair, and on the pair with its answers
exchanged.  So the loss must treat pairs independently and read some array for both
answers, with `chosen` and `rejected` in the names.  If it reads an array for only one
answer (CPO's chosen_lengths), the corrected loss also takes the array of the other
answer, after the loss's own arrays.
"""

import inspect
from collections.abc import Callable

import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import Number

__all__ = ["forward_corrected", "gibbs_logits", "unbiased"]


def unbiased(loss: Callable, flip_rate: Number) -> Callable:
    """The loss whose mean over label flips is `loss` on clean labels.

        corrected = [(1 - e) loss(pair) - e loss(swapped)] / (1 - 2e)
                  = loss(pair) + e / (1 - 2e) [loss(pair) - loss(swapped)]

    `unbiased(dpo, e)` is `rdpo`.  The corrected loss has the minimizer of the clean
    loss, but its standard deviation grows like 1 / (1 - 2e).  It may be negative, and
    is unbounded below if `loss` is unbounded above: stop early, or use
    `forward_corrected`.  e = 0 gives `loss`.

    Args:
      loss: a pairwise loss: a function that returns one loss per pair, and whose
        positional parameters name arrays of both answers (policy_chosen_logps and
        policy_rejected_logps, chosen_rewards and rejected_rewards, ...).
      flip_rate: e in [0, 1/2), the probability that a label is wrong; one number, or an
        array that broadcasts to one per pair.  Differentiable.

    Returns:
      A function with the parameters of `loss`, plus the counterparts of arrays that
      `loss` reads for only one answer.

    Raises:
      TypeError: if no array has a counterpart for the other answer, or `loss` couples
        the pairs of a batch (takes `where`), for which the equation does not hold.
      ValueError: if a Python `flip_rate` is outside [0, 1/2); when called, if an array
        of rates does not broadcast to the pairs.  Values in arrays are not checked; 1/2
        in an array gives infinities or NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import unbiased, ipo
      >>> zero, margin = jnp.zeros(2), jnp.array([3.0, -3.0])
      >>> right, wrong = unbiased(ipo, 0.25)(margin, zero, zero, zero, beta=0.5)
      >>> print(f"{0.75 * right + 0.25 * wrong:.4f}")  # ipo of the clean label
      4.0000

    References:
      Natarajan et al., "Learning with Noisy Labels", NeurIPS 2013, the unbiased
      estimator of a loss, here for flips at one rate both ways.
      Ray Chowdhury, Kini and Natarajan, 2024, arXiv:2403.00409, for DPO.
    """

    def correct(pair, exchanged):
        # The second form of the equation: in the first, two numbers may nearly cancel,
        # and the division by 1 - 2e amplifies the error.
        return pair + _common.correction(flip_rate, pair) * (pair - exchanged)

    corrected = _in_both_orders(loss, correct, "unbiased")
    _check_range(flip_rate)
    return corrected


def forward_corrected(loss: Callable, flip_rate: Number) -> Callable:
    """The likelihood of the observed label under the preference that `loss` implies.

        p         = s(z),    z = loss(swapped) - loss(pair), the `gibbs_logits`
        corrected = -log((1 - e) p + e (1 - p))

    p is the probability of the label if preferences follow exp(-loss).
    `forward_corrected(dpo, e)` is `forward_dpo`.  The corrected loss is bounded between
    -log(1 - e) and -log e.  It is redescending: a strongly contradicted pair is treated
    as a flip.  Only the difference of the two losses matters.  So e = 0 gives the
    logistic loss of the difference, which is `loss` itself for DPO but not for IPO.

    Args:
      loss: a pairwise loss: a function that returns one loss per pair, and whose
        positional parameters name arrays of both answers (policy_chosen_logps and
        policy_rejected_logps, chosen_rewards and rejected_rewards, ...).
      flip_rate: e, the probability that a label is wrong; one number in [0, 1/2), or an
        array that broadcasts to one per pair and may hold anything in [0, 1].
        Differentiable on (0, 1), so that it can be learned.

    Returns:
      A function with the parameters of `loss`, plus the counterparts of arrays that
      `loss` reads for only one answer.

    Raises:
      TypeError: if no array has a counterpart for the other answer, or `loss` couples
        the pairs of a batch (takes `where`).
      ValueError: if a Python `flip_rate` is outside [0, 1/2); when called, if an array
        of rates does not broadcast to the pairs.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import forward_corrected, ipo
      >>> zero, margin = jnp.zeros(2), jnp.array([40.0, -40.0])
      >>> loss = forward_corrected(ipo, 0.25)(margin, zero, zero, zero)
      >>> [f"{x:.4f}" for x in loss]  # -log(1 - e), -log e
      ['0.2877', '1.3863']

    References:
      Cao et al., "Robust Preference Optimization: Aligning Language Models with Noisy
      Preference Feedback" (RE-PO), 2025, arXiv:2509.24159, Eq. 2 and 3.
    """
    logits = gibbs_logits(loss)
    _check_range(flip_rate)

    def corrected(*args, **kwargs):
        z = logits(*args, **kwargs)
        return _common.flipped_logistic_loss(z, _common.rates(flip_rate, z))

    signature = inspect.signature(logits)
    return _with_metadata(corrected, loss, signature, "forward_corrected")


def gibbs_logits(loss: Callable) -> Callable:
    """The logit of the preference probability that `loss` implies, in nats.

        z = loss(swapped) - loss(pair),    P(y_w is preferred) = s(z)

    This holds if preferences follow exp(-loss).  DPO: h.  IPO: 2 D / beta.  SimPO:
    log s(m - gamma) - log s(-m - gamma), with m its margin.  CPO: beta times the
    log-prob margin, plus nll_weight times the margin of the averages.  Terms that both
    losses share cancel.

    Args:
      loss: a pairwise loss: a function that returns one loss per pair, and whose
        positional parameters name arrays of both answers (policy_chosen_logps and
        policy_rejected_logps, chosen_rewards and rejected_rewards, ...).

    Returns:
      A function with the parameters of `loss`, plus the counterparts of arrays that
      `loss` reads for only one answer.  It returns [*batch], at least float32.

    Raises:
      TypeError: if no array has a counterpart for the other answer, or `loss` couples
        the pairs of a batch (takes `where`).

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import gibbs_logits, ipo
      >>> zero, margin = jnp.zeros(2), jnp.array([3.0, -3.0])
      >>> print(gibbs_logits(ipo)(margin, zero, zero, zero, beta=0.5))
      [ 12. -12.]

    References:
      Cao et al., "Robust Preference Optimization: Aligning Language Models with Noisy
      Preference Feedback" (RE-PO), 2025, arXiv:2509.24159, Eq. 2.
    """
    return _in_both_orders(
        loss, lambda pair, exchanged: exchanged - pair, "gibbs_logits"
    )


def _in_both_orders(loss: Callable, combine: Callable, how: str) -> Callable:
    """`combine(loss(pair), loss(swapped))`, with the signature of `loss`."""
    name = _name(loss)
    signature = inspect.signature(loss)
    parameters = list(signature.parameters.values())
    reads = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    if "where" in signature.parameters:
        raise TypeError(
            f"Expected a loss that treats pairs independently, got {name}, which "
            "couples the pairs of a batch: their flips cannot be corrected one by one."
        )
    others = {array: _other_answer(array) for array in reads}
    alone = [array for array, other in others.items() if other not in others]
    if all(array == other or array in alone for array, other in others.items()):
        missing = ", ".join(f"{array} but not {others[array]}" for array in alone)
        raise TypeError(
            f"Expected a loss that names its arrays for both answers, got {name}, "
            f"which reads {missing or ', '.join(reads)}."
        )
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    added = [inspect.Parameter(others[array], kind) for array in alone]
    parameters[len(reads) : len(reads)] = added
    others |= {others[array]: array for array in alone}
    called_as = signature.replace(parameters=parameters)

    def both(*args, **kwargs):
        arguments = called_as.bind(*args, **kwargs).arguments
        exchanged = {others.get(key, key): value for key, value in arguments.items()}
        own = lambda given: {
            k: v for k, v in given.items() if k in signature.parameters
        }
        return combine(loss(**own(arguments)), loss(**own(exchanged)))

    return _with_metadata(both, loss, called_as, how)


def _with_metadata(function: Callable, loss: Callable, signature, how: str) -> Callable:
    """Gives `function` the name and signature of `how` applied to `loss`."""
    function.__name__ = function.__qualname__ = f"{how}_{_name(loss)}"
    function.__signature__ = signature
    function.__doc__ = f"`{how}` of `{_name(loss)}`, with the same parameters."
    if getattr(getattr(loss, "func", loss), "reward_per_token", False):
        _common.reward_per_token(function)
    return function


def _name(loss: Callable) -> str:
    """The name of the loss, or of the function that a `functools.partial` wraps."""
    inner = getattr(loss, "func", loss)
    return getattr(inner, "__name__", type(inner).__name__)


def _check_range(flip_rate) -> None:
    """Raises ValueError for a number out of range; arrays are checked when called."""
    _common.rates(flip_rate if jnp.ndim(flip_rate) == 0 else 0.0, jnp.zeros(()))


def _other_answer(name: str) -> str:
    """The name with chosen and rejected exchanged."""
    exchange = {"chosen": "rejected", "rejected": "chosen"}
    return "_".join(exchange.get(word, word) for word in name.split("_"))
