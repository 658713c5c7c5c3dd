"""What a run has trained, in one of its checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding

from jaxpref.models.folder import load_params
from jaxpref.models.partition import Partition
from jaxpref.runtime.memory import check_arrays
from jaxpref.runtime.saved_parts import read_part


@dataclasses.dataclass(frozen=True)
class Saved:
    """A step of a run."""

    step: Path
    """The step's folder, RUN/checkpoints/STEP."""
    digest: str
    """SHA-256 (hex) of what the step says about itself and its arrays."""
    partition: Partition | None
    """What the run trains of its model; None for everything."""
    dtype: str
    """The dtype of what it trains."""
    is_reward: bool = False
    """Whether it trains a reward model."""


def load_saved(saved: Saved, folder: Path, model: Any) -> Any:
    """The parameters of a model at a step of a run, in the model's parameter dtype.

    Every process reads only the shards of its own devices.  What the run has not
    trained is read from the model that it began with, and is not quantized.

    Args:
        saved: the step.
        folder: the folder of the model with which the run began.
        model: a language or reward model of its architecture.

    Raises:
        InputError: if the step or the folder cannot be read, or is damaged.
    """
    part, dtype = saved.partition, jnp.dtype(model.numerics.param_dtype)
    numerics = dataclasses.replace(model.numerics, param_dtype=saved.dtype)
    trained_model = dataclasses.replace(model, numerics=numerics)

    def start(key: jax.Array) -> Any:
        params = trained_model.init(key)
        return params if part is None else part.trained(params, trained_model, key)

    shapes = jax.tree.map(_placed, jax.eval_shape(start, jax.random.key(0)))
    check_arrays(f"{saved.step}: the weights", shapes)
    trained = read_part(saved.step, "params", shapes)
    trained = jax.tree.map(lambda x: x.astype(dtype), trained)
    if part is None:
        return trained
    # A reward head that is trained need not be in the folder.
    key = jax.random.key(0) if saved.is_reward else None
    frozen = load_params(folder, model, key, only=part.freezes)
    return part.join(trained, part.frozen(frozen))


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape on the devices of the current mesh, or on the first device."""
    mesh, sharding = jax.sharding.get_mesh(), SingleDeviceSharding(jax.devices()[0])
    if leaf.sharding is not None and not mesh.empty:
        sharding = NamedSharding(mesh, leaf.sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
