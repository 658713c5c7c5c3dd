"""The architecture of a model: the sizes that all families share."""

import dataclasses
from typing import TYPE_CHECKING, Any

from jaxpref.errors import InputError

if TYPE_CHECKING:
    from jaxpref.models.families.family import Family


def at_least(minimum: float, **options: Any) -> Any:
    """A dataclass field with a minimum, which `Architecture` checks."""
    return dataclasses.field(metadata={"minimum": minimum}, **options)


def check_minimums(values: Any, what: str) -> None:
    """Raises InputError if a field declared with `at_least` is below its minimum."""
    for field in dataclasses.fields(values):
        minimum, value = field.metadata.get("minimum"), getattr(values, field.name)
        if minimum is not None and value < minimum:
            raise InputError(
                f"{what}: {field.name} is {value}; it must be >= {minimum}"
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

    def __post_init__(self):
        check_minimums(self, "architecture")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"architecture: num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )

    @property
    def family(self) -> "Family":
        """The modules, tensor names and config.json fields of this architecture."""
        raise NotImplementedError

    @property
    def logit_soft_cap(self) -> float | None:
        """The soft cap of the LM head's logits, see `logprobs.logits`."""
        return None

    @property
    def sharded_sizes(self) -> dict[str, tuple[str, ...]]:
        """Names of sizes, and the mesh axes that must divide each of them."""
        return {
            "num_kv_heads": ("tensor",),
            "num_heads": ("tensor",),
            "intermediate_size": ("tensor",),
            "vocab_size": ("fsdp", "tensor"),
            "hidden_size": ("fsdp", "tensor"),
        }
