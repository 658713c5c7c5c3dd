"""The options of `jaxpref sweep` besides those of `jaxpref train`, and its runs."""

import dataclasses
from collections.abc import Mapping

from jaxpref.errors import InputError
from jaxpref.runtime.ranges import at_least
from jaxpref.train.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What is compared, and how."""

    over: tuple[str, ...]
    """An option of `jaxpref train` and its values, as in --over loss.beta=0.03,0.1.
    Give --over several times for a grid: every combination is trained."""
    kl_prompts: int = 64
    """Held-out prompts that each policy answers, for its KL to the reference; 0 for no
    KL."""
    kl_tokens: int = 128
    """Maximum tokens of these answers.  The KL is that of answers cut there."""
    reward_model: str | None = None
    """Reward model that scores the same answers: a folder or Hub ID."""
    most_kl: float | None = None
    """KL budget in nats.  For each method, name the setting with the highest reward (or
    the highest held-out accuracy without --reward-model) among those whose mean KL is
    at most this."""

    def __post_init__(self):
        at_least(0, self, "kl_prompts")
        at_least(1, self, "kl_tokens")
        if self.most_kl is not None and not self.most_kl > 0:
            raise InputError(f"--most-kl {self.most_kl}: must be above 0")
        for name in ("reward_model", "most_kl"):
            value = getattr(self, name)
            if value is not None and not self.kl_prompts:
                raise InputError(
                    f"--{name.replace('_', '-')} {value}: needs answers of the "
                    "policies; leave out --kl-prompts 0"
                )


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One combination of values."""

    name: str
    """The name of its folder in OUT."""
    values: Mapping[str, str]
    """The value of each swept option that it has."""
    config: TrainConfig
    """Its config."""
    command: str
    """The command line that makes the same run."""
