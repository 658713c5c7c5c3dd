"""A completion as `jaxpref sample` writes it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One completion."""

    text: str
    logp: float | None
    """log p(completion | prompt) in nats, of the model's own distribution; None if it
    is part of a longer reply."""
    ended: bool
    """Whether it ends with a stop token; False if it was cut at the maximum length."""
