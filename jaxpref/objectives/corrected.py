"""Corrections of label noise for any pairwise loss, with a rate for all or each record.

The mathematics is in `jaxpref.losses`: `unbiased` and `forward_corrected`.
"""

import functools
import inspect
from collections.abc import Callable

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.objectives.bound_loss import Given, Loss


def unbiased(loss: Loss, *, flip_rate: float | Given) -> Loss:
    """The loss whose mean over label flips is the loss of clean labels.

        corrected = [(1 - e) loss(pair) - e loss(swapped)] / (1 - 2e)

    Its minimizer is that of the clean loss, but its standard deviation grows like
    1 / (1 - 2e), and it may be unbounded below.  Of DPO, it is `rdpo`.

    Args:
      loss: a pairwise loss, or a `functools.partial` that sets hyperparameters.
      flip_rate: e, the probability that a label is wrong, in [0, 1/2); for each record,
        any number from 0 to 1 but 1/2: above it, the label is probably wrong.

    Raises:
      InputError: if the loss couples the pairs of a batch, reads one answer only, or
        has a flip rate itself.

    References:
      Natarajan et al., "Learning with Noisy Labels", NeurIPS 2013; for DPO, Ray
      Chowdhury, Kini and Natarajan, 2024, arXiv:2403.00409.
    """
    return _corrected(loss, losses.unbiased, flip_rate)


def forward(loss: Loss, *, flip_rate: float | Given) -> Loss:
    """The likelihood of the observed label, which may be a flipped one.

        corrected = -log((1 - e) p + e (1 - p)),    p = s(loss(swapped) - loss(pair))

    It is bounded, and treats a strongly contradicted pair as a flip.  Of DPO, it is
    `forward_dpo`.

    Args:
      loss: a pairwise loss, or a `functools.partial` that sets hyperparameters.
      flip_rate: e, the probability that a label is wrong, in [0, 1/2); for each record,
        any number from 0 to 1.  At 1/2, a pair has no gradient; above it, the label
        counts as reversed.

    Raises:
      InputError: if the loss couples the pairs of a batch, reads one answer only, or
        has a flip rate itself.

    References:
      Xu et al., FA-DPO, 2025, arXiv:2512.00709; Cao et al., RE-PO, 2025,
      arXiv:2509.24159, Eq. 2 and 3.
    """
    return _corrected(loss, losses.forward_corrected, flip_rate)


def _corrected(loss: Loss, correct: Callable, flip_rate: float | Given) -> Loss:
    """`correct(loss, flip_rate)`, as a loss with one more hyperparameter."""
    options = {"flip_rate": flip_rate}
    if isinstance(loss, functools.partial):
        loss, options = loss.func, loss.keywords | options
    try:
        example = correct(loss, 0.0)
    except TypeError as error:
        raise InputError(f"loss {loss.__name__}: {error}") from error
    signature = inspect.signature(example)
    if "flip_rate" in signature.parameters:
        raise InputError(
            f"loss {loss.__name__}: it has a flip_rate and corrects for it itself; "
            "leave the correction out"
        )

    def corrected(*arrays, flip_rate, **options):
        return correct(loss, flip_rate)(*arrays, **options)

    rate = inspect.Parameter("flip_rate", inspect.Parameter.KEYWORD_ONLY)
    functools.update_wrapper(corrected, example)
    corrected.__signature__ = signature.replace(
        parameters=[*signature.parameters.values(), rate]
    )
    return functools.partial(corrected, **options)
