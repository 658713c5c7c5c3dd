"""The options of `jaxpref merge`: those of every method, and of each."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Literal

from jaxpref.data import RecordOptions
from jaxpref.errors import InputError
from jaxpref.merge.arrays import normalized
from jaxpref.runtime.mesh import MeshConfig
from jaxpref.runtime.ranges import at_least
from jaxpref.train.options import Dtype

StoredDtype = Literal["float32", "float16", "bfloat16"]
LAYER = re.compile(r"(?:^|\.)(\d+)\.")
"""The layer's number in the name of a tensor: the first number between dots."""
BLOCK = re.compile(r"(\d+)(?:-(\d+))?=(.+)")
"""A block of layers and its weights: `0-7=0.2,0.8`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """What every method reads."""

    models: tuple[str, ...]
    """Hugging Face model folders (such as OUT/export of a run) or Hub IDs, all language
    models or all reward models, of one architecture and vocabulary."""
    out: str
    """Folder for the merged model.  It must be new or empty, or hold an earlier merge,
    which is replaced."""
    method: Literal["linear", "slerp", "task", "greedy", "adapter"] = "linear"
    """How the weights are combined.  Each method has its own options, below."""
    dtype: StoredDtype | None = None
    """Dtype of the merged weights (default: each tensor's dtype in the first model).
    Sums are always in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """The weighted mean of the models."""

    weights: tuple[float, ...] = ()
    """Weight of each model (default: equal).  They are divided by their sum."""
    layer_weights: tuple[str, ...] = ()
    """Weights of the models for blocks of layers, counted from 0: 0-7=0.2,0.8
    8-15=0.5,0.5 gives layers 0 to 7 the weights 0.2 and 0.8.  Other layers, the
    embeddings and the head have --weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slerp:
    """Spherical interpolation between two models."""

    weights: tuple[float, ...] = ()
    """Two weights that sum to 1 (default: 0.5 0.5).  The second is t, the position
    between the two models."""
    layer_weights: tuple[str, ...] = ()
    """Weights for blocks of layers, counted from 0: 0-7=0.9,0.1 8-15=0.5,0.5."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A base model plus scaled differences of the models from it."""

    base: str
    """Model folder or Hub ID from which the models were fine-tuned."""
    weights: tuple[float, ...]
    """Scale of each model's difference from the base; above 1, it extrapolates."""
    layer_weights: tuple[str, ...] = ()
    """Scales for blocks of layers, counted from 0: 0-7=0.2,0.8 8-15=1,0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy(RecordOptions):
    """The mean of those models that do not lower the accuracy on preference pairs."""

    data: str
    """Preference file or dataset that decides which models are kept.  Report accuracies
    on another one."""
    reference: str | None = None
    """Reference model folder or Hub ID (default: none, so answers are ranked by
    log-probability).  A reward model needs none."""
    batch_size: int = 16
    """Pairs scored at once, over all devices."""
    max_length: int | None = None
    """Maximum tokens of prompt and completion together (default: 1024, or the model's
    context if that is shorter)."""
    max_prompt_length: int | None = None
    """Maximum tokens of a prompt (default: what the completions leave of --max-length,
    at least half).  Longer prompts lose their earliest turns, or their first tokens."""
    compute_dtype: Dtype | None = None
    """Dtype of matrix products and activations (default: bfloat16 on TPU and GPU,
    float32 on CPU)."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are used."""

    def __post_init__(self):
        super().__post_init__()
        at_least(1, self, "batch_size")
        at_least(2, self, "max_length", "max_prompt_length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """A model and its adapter: W + s a b."""

    adapter: str
    """Folder of a LoRA or DoRA adapter of the model, such as OUT/adapter of a run, or
    its Hub ID."""


Method = Linear | Slerp | Task | Greedy | Adapter
METHODS: dict[str, type[Method]] = {
    "linear": Linear,
    "slerp": Slerp,
    "task": Task,
    "greedy": Greedy,
    "adapter": Adapter,
}
"""The options of each method, by its name."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of layers with weights of its own."""

    first: int
    last: int
    """The last layer, which belongs to the block."""
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Weights:
    """One weight per model, for every tensor."""

    elsewhere: tuple[float, ...]
    """The weights outside of the blocks."""
    blocks: tuple[Block, ...] = ()

    def of(self, tensor: str) -> tuple[float, ...]:
        """The weights of a tensor, by its name."""
        if found := LAYER.search(tensor):
            for block in self.blocks:
                if block.first <= int(found[1]) <= block.last:
                    return block.weights
        return self.elsewhere


def read_weights(method: Linear | Slerp | Task, models: int, layers: int) -> Weights:
    """The weights in the options of a method; those of a mean sum to 1.

    Args:
      method: the options.
      models: number of models.
      layers: number of layers of each.

    Raises:
      InputError: names the option, and the block that cannot be read, overlaps another
        one, or contains layers that the models do not have.
    """
    given = method.weights or (1 / models,) * models
    elsewhere = _checked(method, f"--weights {_shown(given)}", given, models)
    blocks: list[Block] = []
    for text in method.layer_weights:
        flag = f"--layer-weights {text}"
        block = _block(text, flag)
        if not block.first <= block.last < layers:
            raise InputError(
                f"{flag}: no such layers; the models have {layers}, numbered 0 to "
                f"{layers - 1}"
            )
        for other in blocks:
            if block.first <= other.last and other.first <= block.last:
                raise InputError(
                    f"{flag}: overlaps the layers {other.first}-{other.last}; give each"
                    " layer once"
                )
        weights = _checked(method, flag, block.weights, models)
        blocks.append(dataclasses.replace(block, weights=weights))
    return Weights(elsewhere, tuple(blocks))


def _block(text: str, flag: str) -> Block:
    expected = f"{flag}: expected layers and one weight per model, such as 0-7=0.2,0.8"
    found = BLOCK.fullmatch(text)
    if found is None:
        raise InputError(expected)
    first, last, listed = found.groups()
    try:
        weights = tuple(map(float, listed.split(",")))
        return Block(int(first), int(last or first), weights)
    except ValueError:
        raise InputError(expected) from None


def _checked(
    method: Linear | Slerp | Task, flag: str, weights: Sequence[float], models: int
) -> tuple[float, ...]:
    if len(weights) != models:
        raise InputError(
            f"{flag}: {len(weights)} weights for {models} models; give one per model"
        )
    if not all(map(math.isfinite, weights)):
        raise InputError(f"{flag}: weights must be finite numbers")
    match method:
        case Slerp() if abs(math.fsum(weights) - 1) > 1e-6:
            raise InputError(
                f"{flag}: must sum to 1 for slerp, as 0.7 and 0.3 do; the second is "
                "the position between the models"
            )
        case Linear():
            try:
                return normalized(weights)
            except ValueError:
                raise InputError(
                    f"{flag}: sum to 0, so there is no weighted mean; use --method "
                    "task to add and subtract what models have learned"
                ) from None
    return tuple(weights)


def _shown(weights: Sequence[float]) -> str:
    return " ".join(f"{weight:g}" for weight in weights)
