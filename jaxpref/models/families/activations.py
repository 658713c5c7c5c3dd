"""The activations of MLPs, by their names in config.json."""

import functools
from collections.abc import Callable

import jax

from jaxpref.errors import InputError
from jaxpref.models.config_json import ConfigFields

_GELU_TANH = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""`transformers` has three names for the approximation of GELU with tanh."""


def read_activation(fields: ConfigFields, name: str, default: str) -> str:
    """The activation named by a field.

    Raises:
        InputError: if it is not supported.
    """
    value = fields.read(name, str, default)
    if value not in ACTIVATIONS:
        raise InputError(
            f"{fields.source}: field {name} is {value!r}; supported: "
            f"{', '.join(ACTIVATIONS)}"
        )
    return value
