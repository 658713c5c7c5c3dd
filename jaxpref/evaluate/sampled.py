"""A completion as `jaxpref sample` writes it."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One completion."""

    text: str
    logp: float | None
    """log p(completion | prompt) in nats, of the model's own distribution; None if it
    is part of a longer reply."""
    ended: bool
    """Whether it ends with a stop token; False if it was cut at the maximum length."""
    direction: tuple[float, ...] | None = None
    """The direction in the space of rewards that it was asked for; None for none."""
    score: float | None = None
    """The reward or similarity used to choose; None for none, or if not finite."""

    def as_record(self) -> dict[str, Any]:
        """Its fields as JSON values, without a direction or a score if it has none."""
        fields = dataclasses.asdict(self)
        optional = ("direction", "score")
        return {k: v for k, v in fields.items() if v is not None or k not in optional}
