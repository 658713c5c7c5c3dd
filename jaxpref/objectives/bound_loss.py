"""A loss function with its hyperparameters, checked before any model is loaded."""

import dataclasses
import enum
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxpref import losses
from jaxpref.data.columns import ARRAYS, accept
from jaxpref.errors import InputError
from jaxpref.objectives.inputs import Inputs
from jaxpref.scoring.scores import DESCRIPTIONS, OF_HEADS, score_and_side

Loss = Callable[..., Array]
"""A loss of `jaxpref.losses`, or a `functools.partial` that sets hyperparameters."""


class Given(enum.Enum):
    """Where the value of a hyperparameter comes from, if it is not one number."""

    PER_RECORD = "per record"


PER_RECORD = Given.PER_RECORD
"""A hyperparameter whose value is a number of each record, in the column of its name.
"""


@dataclasses.dataclass(frozen=True)
class BoundLoss:
    """A pairwise loss and the values of all its hyperparameters."""

    function: Loss
    """The loss, without bound hyperparameters."""
    options: Mapping[str, Any]
    """All its hyperparameters, including defaults."""
    arrays: tuple[str, ...]
    """Names of the arrays it takes, in order."""

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.function.__name__

    @property
    def per_record(self) -> tuple[str, ...]:
        """The hyperparameters that differ between records."""
        return tuple(k for k, x in self.options.items() if x is PER_RECORD)

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of all arrays that it reads."""
        return (*self.arrays, *self.per_record)

    @property
    def couples_pairs(self) -> bool:
        """Whether a pair's loss depends on the other pairs of its batch."""
        return "where" in inspect.signature(self.function).parameters

    def __call__(self, inputs: Inputs) -> Array:
        """One loss per pair, [..., S]; values in empty slots are meaningless."""
        where = {"where": inputs.is_pair} if self.couples_pairs else {}
        return self.function(*inputs.arrays(self.arrays), **self._own(inputs), **where)

    def check(self, name: str, value: float) -> None:
        """Raises ValueError if a hyperparameter may not have this value for a record.

        The loss itself checks it, as for all records.  But the flip rate of a record
        may be above 1/2: its label is probably wrong.
        """
        if name == "flip_rate":
            if value == 0.5 and self._diverges_at_half:
                raise ValueError(
                    f"{self.name} divides by 1 - 2 flip_rate, and a label that is wrong"
                    " with probability 0.5 says nothing."
                )
        elif name in self.per_record:
            _trace(self.function, {**self.options, name: value})

    @functools.cached_property
    def _diverges_at_half(self) -> bool:
        """Whether the loss is not finite at a flip rate of 1/2."""
        options = dict.fromkeys(self.per_record, jnp.ones(1))
        options["flip_rate"] = jnp.full(1, 0.5)
        arrays = [jnp.ones(_of_one(name).shape) for name in self.arrays]
        merged = {**self.options, **options}
        return not jnp.isfinite(self.function(*arrays, **merged)[0])

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
        return lambda inputs: function(*inputs.arrays(names), **self._own(inputs))

    def logit_reads(self) -> tuple[str, ...]:
        """Names of the arrays that `logits` reads: the loss's, for both sides."""
        return (*arrays_of(losses.gibbs_logits(self.function)), *self.per_record)

    def _own(self, inputs: Inputs) -> dict[str, Any]:
        """The hyperparameters, with those of the pairs, [..., S]."""
        return {
            name: of_pairs(inputs, name) if value is PER_RECORD else value
            for name, value in self.options.items()
        }


def check_of(bound: BoundLoss) -> Callable[[str, float], None]:
    """`bound.check` for many records: tracing a loss takes a millisecond.

    Ranges are intervals, so only values outside those already accepted are checked.
    """
    if not bound.per_record:
        return accept
    accepted: dict[str, tuple[float, float]] = {}

    def check(name: str, value: float) -> None:
        low, high = accepted.get(name, (jnp.inf, -jnp.inf))
        if name == "flip_rate" or not low <= value <= high:
            bound.check(name, value)
            accepted[name] = min(low, value), max(high, value)

    return check


def of_pairs(inputs: Inputs, name: str) -> Array:
    """A hyperparameter of each pair, [..., S]; that of some pair in empty slots.

    The 0 of empty slots may be out of range, and an infinite loss that is left out
    would still make the gradient NaN.
    """
    values, real = inputs[name], inputs.is_pair
    return jnp.where(real, values, jnp.max(jnp.where(real, values, -jnp.inf)))


def bind(loss: Loss, **options: Any) -> BoundLoss:
    """Binds hyperparameters to a loss and checks them.

    Args:
      loss: a per-pair loss whose positional parameters name the arrays it reads, or a
        `functools.partial` of one that sets hyperparameters.
      **options: further hyperparameters.  `PER_RECORD` reads them from the records,
        unless the loss couples the pairs of a batch.

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
    coupled = "where" in inspect.signature(loss).parameters
    if coupled and (own := [k for k, x in options.items() if x is PER_RECORD]):
        raise InputError(
            f"loss {loss.__name__}: couples the pairs of a batch, so "
            f"{' and '.join(own)} must be one number for all records"
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
    computed = [name for name in reads if name not in ARRAYS]
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
    if scores & OF_HEADS and len(scores - {"lengths"}) > 1:
        raise InputError(
            f"loss {loss.__name__}: reads {', '.join(sorted(scores))}; a model gives "
            "either rewards or log-probabilities"
        )
    try:
        if "where" in options:
            raise TypeError("where marks empty slots and is set by the training step")
        _trace(loss, options, *scalars)
    except (TypeError, ValueError) as error:
        raise InputError(f"loss {loss.__name__}: {error}") from error


def _trace(loss: Loss, options: Mapping[str, Any], *scalars: str) -> None:
    """Traces the loss on one pair; it checks the hyperparameters that are numbers."""
    pair = jax.ShapeDtypeStruct((1,), jnp.float32)
    one = jax.ShapeDtypeStruct((), jnp.float32)
    numbers = {k: x for k, x in options.items() if x is not PER_RECORD}
    jax.eval_shape(
        functools.partial(loss, **numbers),
        *(one if name in scalars else _of_one(name) for name in arrays_of(loss)),
        **dict.fromkeys(options.keys() - numbers.keys(), pair),
    )


def _of_one(name: str) -> jax.ShapeDtypeStruct:
    """An array that a loss reads, of one pair."""
    shape = (1, 2) if name.endswith("embeddings") else (1,)
    return jax.ShapeDtypeStruct(shape, bool if name == "desirable" else jnp.float32)
