"""How answers are sampled in training."""

import dataclasses
import math
from typing import Literal

from jaxpref.errors import InputError
from jaxpref.runtime.ranges import at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How answers are sampled: at temperature 1 and without filters.

    So they come from the distribution whose gradient is taken.
    """

    group_size: int = 8
    """K, answers to each prompt; 1 only for reinforce and ppo_clip."""
    max_new_tokens: int = 128
    """Maximum tokens of an answer."""
    updates_per_sample: int = 1
    """Optimizer steps per batch of sampled answers; after the first, importance ratios
    correct for the updated policy."""
    sample_batch_size: int = 64
    """Answers that are sampled at once, over all devices."""
    overlong_buffer: int = 0
    """Tokens before --max-new-tokens over which a length penalty, subtracted from the
    reward in training, grows linearly from 0 to 1; 0 for none."""
    resample_uniform: int = 0
    """Maximum further draws per step: groups whose rewards are all equal are replaced
    by groups of other prompts (DAPO's dynamic sampling)."""
    prompt_target: float | None = None
    """Of --prompt-candidates times as many random prompts as a step needs, answer
    those whose mean reward so far is nearest to this number, such as 0.5 (default: all
    prompts in turn)."""
    prompt_candidates: int = 4
    """For --prompt-target: random candidates per prompt that is answered."""
    eval_group_size: int = 1
    """Answers to each prompt of --eval-data at each evaluation."""
    log_samples: int = 1
    """Number of prompts per logged step whose answers are written to OUT/samples.jsonl.
    """

    def __post_init__(self):
        at_least(
            1,
            self,
            "group_size",
            "max_new_tokens",
            "updates_per_sample",
            "sample_batch_size",
            "prompt_candidates",
            "eval_group_size",
        )
        if self.prompt_target is not None and not math.isfinite(self.prompt_target):
            raise InputError(f"prompt_target {self.prompt_target}: must be finite")
        at_least(0, self, "overlong_buffer", "resample_uniform", "log_samples")
        if self.overlong_buffer > self.max_new_tokens:
            raise InputError(
                f"overlong_buffer {self.overlong_buffer}: must be at most "
                f"max_new_tokens, {self.max_new_tokens}"
            )


OF_REWARDS = (
    *("overlong_buffer", "resample_uniform", "eval_group_size"),
    *("prompt_target", "prompt_candidates"),
)
"""Options of sampling that change or follow the rewards."""


UNREAD = ("loader_processes", "eval_samples", "eval_sample_tokens")
"""Options of other runs: there are no records to prepare or to score."""
OF_EVALUATIONS = ("keep_best", "eval_every", "patience", "export")
"""Options that are only read with `eval_data`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptions:
    """What is read of the pairs whose prompts are answered, for `hypo`."""

    max_length: int | None = None
    """Maximum tokens of a prompt with one answer, of the pair or sampled (default:
    1024, or the model's context if that is shorter).  Prompts are truncated to what
    --max-new-tokens leaves of it, and then answers of the pair to what prompts leave.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class UncertainReward:
    """The uncertainty of a single reward model."""

    uncertainty: Literal["dropout", "ensemble", "laplace"] | None = None
    """For --combine lower_bound with one reward model: its standard deviation, by
    dropout on the features that the head reads, of heads that are fitted to resampled
    pairs, or by the head's posterior."""
    fit_data: str | None = None
    """Pairs that the reward model was trained on: for ensemble and laplace."""
    passes: int = 10
    """Dropout masks, or heads that are fitted."""
    dropout_rate: float = 0.1
    """Probability of dropping a feature."""


CERTAIN = UncertainReward()
"""A reward whose uncertainty is not read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptNumbers:
    """What is read of each record besides its prompt."""

    columns: tuple[str, ...] = ()
    """Numbers of the records, as NAME=FIELD, separated by commas or spaces:
    false_positive_rate=e0 false_negative_rate=e1, how often the verifier errs on the
    answers to this prompt.  For rloo and reinforce only."""
