"""A loss function with its hyperparameters, checked before any model is loaded."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpref import losses
from jaxpref.data.labels import LABELS
from jaxpref.errors import InputError
from jaxpref.objectives.inputs import Inputs
from jaxpref.scoring.scores import DESCRIPTIONS, score_and_side

Loss = Callable[..., Array]
"""A loss of `jaxpref.losses`, or a `functools.partial` that sets hyperparameters."""


@dataclasses.dataclass(frozen=True)
class BoundLoss:
    """A pairwise loss and the values of all its hyperparameters."""

    function: Loss
    """The loss, without bound hyperparameters."""
    options: Mapping[str, Any]
    """All its hyperparameters, including defaults."""
    reads: tuple[str, ...]
    """Names of the arrays it takes, in order."""

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.function.__name__

    @property
    def couples_pairs(self) -> bool:
        """Whether a pair's loss depends on the other pairs of its batch."""
        return "where" in inspect.signature(self.function).parameters

    def __call__(self, inputs: Inputs) -> Array:
        """One loss per pair, [..., S]; values in empty slots are meaningless."""
        where = {"where": inputs.is_pair} if self.couples_pairs else {}
        return self.function(*inputs.arrays(self.reads), **self.options, **where)

    def logits(self) -> Callable[[Inputs], Array]:
        """The loss's preference logits: loss(swapped) - loss(pair), [..., S].

        Raises:
          InputError: if the loss is not a pairwise loss.
        """
        try:
            function = losses.gibbs_logits(self.function)
        except TypeError as error:
            raise InputError(f"loss {self.name}: {error}") from error
        names = arrays_of(function)
        return lambda inputs: function(*inputs.arrays(names), **self.options)

    def logit_reads(self) -> tuple[str, ...]:
        """Names of the arrays that `logits` reads: the loss's, for both sides."""
        return arrays_of(losses.gibbs_logits(self.function))


def bind(loss: Loss, **options: Any) -> BoundLoss:
    """Binds hyperparameters to a loss and checks them.

    Args:
      loss: a per-pair loss whose positional parameters name the arrays it reads, or a
        `functools.partial` of one that sets hyperparameters.
      **options: further hyperparameters.

    Raises:
      InputError: if the loss reads something that a batch of pairs does not have, or
        a hyperparameter is unknown, missing or out of range.
    """
    if isinstance(loss, functools.partial):
        loss, options = loss.func, loss.keywords | options
    reads = arrays_of(loss)
    if missing := unknown_arrays(reads):
        raise InputError(
            f"loss {loss.__name__}: reads {', '.join(missing)}, which "
            "a batch of pairs does not have"
        )
    check_options(loss, options)
    defaults = {
        p.name: p.default
        for p in inspect.signature(loss).parameters.values()
        if p.kind == p.KEYWORD_ONLY and p.name != "where"
    }
    return BoundLoss(loss, defaults | options, reads)


def arrays_of(function: Callable) -> tuple[str, ...]:
    """Names of a function's positional parameters: the arrays it reads."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind != p.KEYWORD_ONLY)


def unknown_arrays(reads: tuple[str, ...]) -> list[str]:
    """The names that a batch of pairs does not provide."""
    computed = [name for name in reads if name not in LABELS]
    return [name for name in computed if score_and_side(name)[0] not in DESCRIPTIONS]


def check_options(loss: Loss, options: Mapping[str, Any], *scalars: str) -> None:
    """Traces the loss on one pair, to detect invalid hyperparameters early.

    Args:
      loss: the loss.
      options: its hyperparameters.
      *scalars: names of the arrays that hold one number per batch.

    Raises:
      InputError: naming the loss and the hyperparameter.
    """
    reads = arrays_of(loss)
    scores = {score_and_side(name)[0] for name in reads} & DESCRIPTIONS.keys()
    if "rewards" in scores and scores - {"rewards", "lengths"}:
        raise InputError(
            f"loss {loss.__name__}: reads {', '.join(sorted(scores))}; a model gives "
            "either rewards or log-probabilities"
        )
    pair = jax.ShapeDtypeStruct((1,), jnp.float32)
    truth = jax.ShapeDtypeStruct((1,), jnp.bool_)
    one = jax.ShapeDtypeStruct((), jnp.float32)
    try:
        if "where" in options:
            raise TypeError("where marks empty slots and is set by the training step")
        jax.eval_shape(
            functools.partial(loss, **options),
            *(
                one if name in scalars else truth if name == "desirable" else pair
                for name in reads
            ),
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"loss {loss.__name__}: {error}") from error
