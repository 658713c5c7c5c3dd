"""The parts of a model family, and the tensors of its parameters in a folder."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jaxpref.models.architecture import Architecture
from jaxpref.models.config_json import ConfigFields
from jaxpref.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class TensorName:
    """The tensor, or one tensor per layer, that holds an array of our parameters.

    `inputs` is the number of the array's leading axes (after the layer axis) that are
    inputs of a matrix.  The file stores `[outputs, inputs]`, each of them flattened; if
    `inputs` is 0, the array is stored as is.
    """

    template: str
    inputs: int = 0

    @property
    def stacked(self) -> bool:
        """Whether the array has a layer axis and the file has one tensor per layer."""
        return "{}" in self.template

    def tensors(self, shape: Sequence[int]) -> list[str]:
        """The names of the tensors that make up an array of this shape."""
        return [self.template.format(i) for i in range(shape[0] if self.stacked else 1)]

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each of them."""
        shape, n = tuple(shape[1:] if self.stacked else shape), self.inputs
        return (math.prod(shape[n:]), math.prod(shape[:n])) if n else shape

    def stored_index(
        self, shape: Sequence[int], index: Sequence[slice]
    ) -> tuple[slice, ...]:
        """The part of a tensor that holds `index` of one layer's array."""
        n = self.inputs
        if n == 0:
            return tuple(index)
        return _flat_slice(shape[n:], index[n:]), _flat_slice(shape[:n], index[:n])


def _flat_slice(shape: Sequence[int], index: Sequence[slice]) -> slice:
    # Of axes that are flattened together, `Specs` shards at most the first (heads,
    # never the features within a head), so a part is one range of rows or columns.
    bounds = [s.indices(n) for s, n in zip(index, shape, strict=True)]
    whole = [(0, n, 1) for n in shape]
    assert bounds[1:] == whole[1:], f"{index} of {shape} is not one range"
    row = math.prod(shape[1:])
    return slice(bounds[0][0] * row, bounds[0][1] * row)


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
