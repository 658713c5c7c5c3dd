"""The parts of a model family, and the tensors of its parameters in a folder."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.errors import InputError
from jaxpref.models.architecture import Architecture
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class TensorName:
    """The tensor, or the tensors, that hold an array of our parameters.

    `template` has one "{}" for each leading axis of which every index is a tensor of
    its own: one for layers, two for layers and experts or heads.  Of the others, the
    first `inputs` are inputs of a matrix and the rest are outputs.  The file stores
    `[outputs, inputs]`, or `[inputs, outputs]` if `input_major`, each of them
    flattened; `[outputs]` if `inputs` is 0, as a bias; and the array as is if `inputs`
    is None.

    A tensor may hold several arrays, which are concatenated along one axis of their
    outputs before they are flattened: `parts` are the paths of all of them in order,
    and `axis` is that axis.
    """

    template: str
    inputs: int | None = None
    input_major: bool = False
    parts: tuple[str, ...] = ()
    axis: int = 0

    @property
    def stacked(self) -> int:
        """The number of leading axes with a tensor for each index."""
        return self.template.count("{}")


MLP_HEAD = {
    "score_hidden": TensorName("score.0.weight", 1),
    "score": TensorName("score.2.weight", 1),
}
"""A reward model's head of two layers, named as in PyTorch's `Sequential`."""


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """Where an array of parameters is in the tensors that hold it."""

    name: TensorName
    shape: tuple[int, ...]
    """The array's shape."""
    start: int = 0
    """Where it starts in the tensor, along the axis of the parts."""
    stop: int | None = None
    """Where the last part ends; None if this is the only one."""

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of what one tensor holds of the array."""
        return self.shape[self.name.stacked :]

    @property
    def tensors(self) -> np.ndarray:
        """The names of the tensors, in an array of the leading axes' shape."""
        leading = self.shape[: self.name.stacked]
        names = [self.name.template.format(*index) for index in np.ndindex(*leading)]
        return np.array(names, object).reshape(leading)

    def at(self, *index: int) -> "StoredArray":
        """The part of one layer, or of one layer and expert."""
        template = self.name.template.format(*index)
        name = dataclasses.replace(self.name, template=template)
        return dataclasses.replace(self, name=name, shape=self.shape[len(index) :])

    @property
    def outputs(self) -> tuple[int, ...]:
        """The outputs of a tensor, all parts together, before they are flattened."""
        shape, axis = self.inner[self.name.inputs or 0 :], self.name.axis
        if self.stop is None:
            return shape
        return (*shape[:axis], self.stop, *shape[axis + 1 :])

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        n = self.name.inputs
        if n is None:
            return self.inner
        shape = (math.prod(self.outputs), math.prod(self.inner[:n]))
        return shape[:1] if n == 0 else shape[::-1] if self.name.input_major else shape

    def read(self, tensor: Any, index: Sequence[slice]) -> np.ndarray:
        """The part `index` of what a tensor holds of the array.

        Args:
            tensor: what slices of `stored_shape` read from the file.
            index: a slice of each axis of `inner`.
        """
        n = self.name.inputs
        if n is None:
            return tensor[tuple(index)]
        bounds = [s.indices(m)[:2] for s, m in zip(index, self.inner, strict=True)]
        sizes = [high - low for low, high in bounds]
        if self.stop is not None:
            low, high = bounds[n + self.name.axis]
            bounds[n + self.name.axis] = (low + self.start, high + self.start)
        rows = _ranges(self.outputs, bounds[n:])
        if n == 0:
            return _concatenate([tensor[row] for row in rows], 0).reshape(sizes)
        (column,) = _ranges(self.inner[:n], bounds[:n])
        if self.name.input_major:
            values = _concatenate([tensor[column, row] for row in rows], 1)
        else:
            values = _concatenate([tensor[row, column] for row in rows], 0).T
        return values.reshape(sizes)


def join(parts: Sequence[tuple[StoredArray, np.ndarray]]) -> np.ndarray:
    """A tensor, from what it holds of each of its arrays; the inverse of `read`."""
    stored, value = parts[0]
    n = stored.name.inputs
    if n is None:
        return value
    if len(parts) > 1:
        arrays = [array for _, array in parts]
        value = np.concatenate(arrays, axis=n + stored.name.axis)
    if n == 0:
        return value.reshape(-1)
    matrix = value.reshape(math.prod(value.shape[:n]), -1)
    return matrix if stored.name.input_major else matrix.T


def _ranges(shape: Sequence[int], bounds: Sequence[tuple[int, int]]) -> list[slice]:
    """A part of an array, as ranges of the flattened array."""
    cut = [i for i, n in enumerate(shape) if bounds[i] != (0, n)]
    last = cut[-1] if cut else 0
    strides = [math.prod(shape[i + 1 :]) for i in range(last + 1)]
    low, high = bounds[last]
    ranges = []
    for before in itertools.product(*(range(*b) for b in bounds[:last])):
        start = sum(i * s for i, s in zip(before, strides[:-1], strict=True))
        start += low * strides[-1]
        ranges.append(slice(start, start + (high - low) * strides[-1]))
    return ranges


def _concatenate(arrays: list[np.ndarray], axis: int) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything that the shared code needs to know about a model family."""

    model_type: str
    """The `model_type` in config.json."""
    causal_lm: str
    """The `transformers` class of its language models."""
    classifier: str
    """The `transformers` class of its sequence classifiers."""
    read_config: Callable[[ConfigFields], Architecture]
    """Reads the architecture from config.json.  A field that it does not read is an
    error, unless it is null, false or harmless."""
    write_config: Callable[[Any], dict[str, Any]]
    """The fields of config.json that describe an architecture of the family."""
    transformer: type[Transformer]
    """The NNX modules."""
    tensors: Mapping[str, TensorName]
    """Parameters by path ("layers.query"), and their tensors in a folder."""
    harmless: Collection[str] = ()
    """Fields of config.json that do not affect the output, in addition to
    `config_json.HARMLESS`."""
    ignored_tensors: tuple[str, ...] = (".rotary_emb.inv_freq",)
    """Suffixes of the names of stored tensors that are not parameters."""
    copied_tensors: tuple[str, ...] = ()
    """Prefixes of the names of stored tensors that belong to parts of the model that
    are not read, such as vision towers.  `folder.save` copies them from its source."""
    rename: Callable[[str], str] = lambda name: name
    """The name in `tensors` of a tensor that some folders call differently."""
    module_name: Callable[[str], str] = lambda name: name
    """The name of a tensor in a module of `transformers`, if the folders' differ."""

    def renamed(self, tensors: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The tensors of a folder by the names that the family gives them.

        Raises:
            InputError: if two of them have the same; the message names `source`.
        """
        found: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if (ours := self.rename(name)) in found:
                raise InputError(
                    f"{source}: tensor {ours} is stored twice, once as {name}; delete "
                    "one of them"
                )
            found[ours] = tensor
        return found

    def stored(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, StoredArray]:
        """Where the arrays of a model are stored, by path.

        Args:
            shapes: the shapes of all of the model's arrays by path.
        """
        found = {}
        tensors = {**self.tensors, **(MLP_HEAD if "score_hidden" in shapes else {})}
        for path, shape in shapes.items():
            name, start, stop = tensors[path], 0, None
            if name.parts:
                axis = name.stacked + (name.inputs or 0) + name.axis
                sizes = [shapes[part][axis] for part in name.parts]
                start, stop = sum(sizes[: name.parts.index(path)]), sum(sizes)
            found[path] = StoredArray(name, tuple(shape), start, stop)
        return found
