"""How answers are sampled in training."""

import dataclasses

from jaxpref.errors import InputError
from jaxpref.runtime.ranges import at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How answers are sampled: at temperature 1 and without filters.

    So they come from the distribution whose gradient is taken.
    """

    group_size: int = 8
    """K, answers to each prompt."""
    max_new_tokens: int = 128
    """Maximum tokens of an answer."""
    updates_per_sample: int = 1
    """Optimizer steps per batch of sampled answers; after the first, importance ratios
    correct for the updated policy."""
    sample_batch_size: int = 64
    """Answers that are sampled at once, over all devices."""
    overlong_buffer: int = 0
    """Tokens before --max-new-tokens over which a length penalty, subtracted from the
    reward, grows linearly from 0 to 1; 0 for none."""
    log_samples: int = 1
    """Number of prompts per logged step whose answers are written to OUT/samples.jsonl.
    """

    def __post_init__(self):
        at_least(2, self, "group_size")
        at_least(1, self, "max_new_tokens", "updates_per_sample", "sample_batch_size")
        at_least(0, self, "overlong_buffer", "log_samples")
        if self.overlong_buffer > self.max_new_tokens:
            raise InputError(
                f"overlong_buffer {self.overlong_buffer}: must be at most "
                f"max_new_tokens, {self.max_new_tokens}"
            )
