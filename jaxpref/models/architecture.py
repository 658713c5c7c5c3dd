"""The architecture of a model: the sizes that all families share."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from jaxpref.errors import InputError

if TYPE_CHECKING:
    from jaxpref.models.families.family import Family


MOST = 2**31 - 1
"""The largest size; positions and token IDs are int32."""
MOST_FEATURES = 2**16
"""Maximum number of features of a head."""
MOST_WEIGHTS = 2**48
"""Maximum number of weights of one matrix in all layers; no machine holds more."""


def at_least(minimum: float, **options: Any) -> Any:
    """A dataclass field with a minimum, which `Architecture` checks."""
    return dataclasses.field(metadata={"minimum": minimum}, **options)


def check_minimums(values: Any, what: str) -> None:
    """Raises InputError if a field declared with `at_least` is out of range.

    It must be at least its minimum, and an int32 or a finite number.
    """
    for field in dataclasses.fields(values):
        minimum, value = field.metadata.get("minimum"), getattr(values, field.name)
        if minimum is None or value is None:
            continue
        most = MOST if isinstance(value, int) else math.inf
        if not minimum <= value <= most or math.isinf(value):
            raise InputError(
                f"{what}: {field.name} is {value}; it must be >= {minimum}"
                + (f" and at most {most}" if isinstance(value, int) else " and finite")
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The architecture of a decoder-only transformer.

    Each family has a subclass with its own fields.  Two models compute the same
    function of their parameters if their architectures are equal; `Numerics` determines
    how they compute it.  Hashable.
    """

    vocab_size: int = at_least(1)
    hidden_size: int = at_least(1)
    intermediate_size: int = at_least(1)
    num_layers: int = at_least(1)
    num_heads: int = at_least(1)
    num_kv_heads: int = at_least(1)
    head_dim: int = at_least(1)
    max_position_embeddings: int = at_least(1, default=2048)
    tie_word_embeddings: bool = False
    initializer_range: float = at_least(0, default=0.02)
    sliding_window: int | None = at_least(1, default=None)
    """Number of tokens, with itself, to which a token attends in layers with sliding
    attention; None for all earlier ones."""
    sliding_layers: tuple[bool, ...] | None = None
    """Whether each layer has sliding attention; None for all of them."""
    attention_soft_cap: float | None = at_least(1e-6, default=None)
    """The soft cap c of attention scores, c tanh(score / c); None for no cap."""
    logit_soft_cap: float | None = at_least(1e-6, default=None)
    """The soft cap of the LM head's logits, see `logprobs.logits`."""

    def __post_init__(self):
        check_minimums(self, "architecture")
        if self.sliding_layers is not None and (
            len(self.sliding_layers) != self.num_layers
        ):
            raise InputError(
                f"architecture: sliding_layers has {len(self.sliding_layers)} values "
                f"for {self.num_layers} layers"
            )
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"architecture: num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim > MOST_FEATURES:
            raise InputError(
                f"architecture: head_dim is {self.head_dim}; the limit is "
                f"{MOST_FEATURES}"
            )
        # Checked here because the arrays of larger ones have no shape.
        features = max(self.intermediate_size, self.num_heads * self.head_dim)
        width = max(self.vocab_size, self.num_layers * features)
        if self.hidden_size * width > MOST_WEIGHTS:
            raise InputError(
                f"architecture: the sizes imply a matrix of "
                f"{self.hidden_size * width:.1e} weights; check them"
            )

    @property
    def family(self) -> "Family":
        """The modules, tensor names and config.json fields of this architecture."""
        raise NotImplementedError

    @property
    def embedding_scale(self) -> float:
        """What the embeddings of tokens are multiplied by when they are looked up."""
        return 1.0

    @property
    def context_length(self) -> int:
        """Number of tokens of the longest text that the model reads."""
        return self.max_position_embeddings

    @property
    def backbone(self) -> "Architecture":
        """This, without what only concerns the LM head."""
        return dataclasses.replace(self, tie_word_embeddings=True)

    @property
    def sharded_sizes(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """Names of sizes, and the mesh axes whose product must divide each of them."""
        tensor, shards = ("tensor",), ("fsdp", "expert")
        return {
            "num_kv_heads": (tensor,),
            "num_heads": (tensor,),
            "intermediate_size": (tensor,),
            "vocab_size": (shards, tensor),
            "hidden_size": (shards, tensor),
        }
