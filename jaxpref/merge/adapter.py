"""A model with its adapter merged in, tensor by tensor."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxpref.errors import InputError
from jaxpref.merge.inputs import ModelFolder
from jaxpref.models import Model
from jaxpref.models.adapter_config import CONFIG
from jaxpref.models.adapter_files import load_adapter
from jaxpref.models.folder import stored_arrays
from jaxpref.models.hub import resolve_folder
from jaxpref.models.paths import by_path
from jaxpref.models.reward import reward_model
from jaxpref.models.stored import stored_params
from jaxpref.models.tensor_files import entries, gather
from jaxpref.models.weights import Weights, is_reward


@dataclasses.dataclass(frozen=True)
class AdapterMerge:
    """A model to which an adapter is added."""

    source: ModelFolder
    """The model."""
    makers: Mapping[str, Callable[[], np.ndarray]]
    """What makes each of its tensors, float32, by name."""

    def tensor(self, name: str) -> np.ndarray:
        """One merged tensor, float32; reads only the tensor of this name.

        Raises:
          InputError: if the result is not finite.
        """
        return self.makers[name]()


def with_adapter(folder: ModelFolder, adapter: str) -> AdapterMerge:
    """A model with an adapter: every adapted matrix is W + s a b.

    Args:
      folder: the model.
      adapter: the adapter's folder or Hub ID.

    Raises:
      InputError: as `load_adapter`, or if it makes a reward model of a language model.
    """
    path = resolve_folder(adapter)
    rewards = (path / CONFIG).exists() and is_reward(Weights(folder.path, path))
    if rewards and not folder.is_reward_model:
        raise InputError(
            f"--adapter {adapter}: is the adapter of a reward model, but {folder.name} "
            "is a language model; use OUT/export of the run that trained it"
        )
    model = Model(folder.architecture)
    if folder.is_reward_model:
        model = reward_model(folder.path)
    lora, trained = load_adapter(path, model)
    stored: dict[str, Any] = dict(stored_params(folder.path, model))
    merged = by_path(lora.exported(trained, stored))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    arrays = stored_arrays(folder.architecture.family, shapes)
    tensors = entries((arrays[name], array) for name, array in merged.items())
    float32 = np.dtype(np.float32)
    return AdapterMerge(
        folder, {x.tensor: functools.partial(gather, x, float32) for x in tensors}
    )
