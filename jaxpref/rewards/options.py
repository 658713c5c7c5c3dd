"""The options of rewards, the same for every command that takes `--reward`."""

import dataclasses
import math
from typing import Literal

from jaxpref.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """Rewards, how they are combined, and what rewards of some kinds read."""

    reward: tuple[str, ...] = ()
    """Folder or Hub ID of a reward model or its adapter; attribute:NAME:DIR; rule:NAME
    (words, characters, distinct:3, regex:PATTERN, exact, number, code);
    log-ratio:STRONG:WEAK; judge:DIR; follow-up:TEXT; or module:function, with arguments
    prompt, answer and record. May be given several times."""
    combine: Literal["sum", "log_sigmoid", "constrained", "lower_bound"] = "sum"
    """How several rewards become one: their sum; the sum of log sigmoid(reward -
    reference), in which no reward makes up for a bad one; the first one plus the
    others, with weights by which the best policy reaches --at-least; or the mean of an
    ensemble minus a multiple of its standard deviation, for at least three answers."""
    weights: tuple[float, ...] = ()
    """Weight of each reward in the sum, in the order of --reward (default: 1)."""
    weights_field: str | None = None
    """Field of the records with the weights for their prompt, a list."""
    reference_quantile: float = 0.85
    """The reference of log_sigmoid: this quantile of the rewards of the prompt's
    answers or, if prompts have fewer than four, of all answers in the file."""
    at_least: tuple[float, ...] = ()
    """For constrained: the mean that each reward after the first must reach."""
    constraint_beta: float = 1.0
    """For constrained: coefficient of the KL divergence from the model that gave the
    answers, in units of the first reward."""
    std_weight: float = 1.0
    """For lower_bound: the multiple of the standard deviation."""
    answer_field: str = "answer"
    """Field of the records with the right answer, for rule:exact and rule:number."""
    tests_field: str = "tests"
    """Field of the records with Python statements that test the code, for rule:code."""
    allow_code_execution: bool = False
    """Let rule:code run the code in answers (docs/trust.md)."""
    follow_up_model: str | None = None
    """Language model that says how likely the text of follow-up:TEXT is."""
    principle: str | None = None
    """What makes an answer better, in words, for judge:DIR."""

    def __post_init__(self):
        if not 0 < self.constraint_beta < math.inf:
            raise InputError(
                f"constraint_beta {self.constraint_beta}: must be above 0 and finite"
            )
        if not 0 <= self.std_weight < math.inf:
            raise InputError(
                f"std_weight {self.std_weight}: must be 0 or more and finite"
            )
        for name in ("weights", "at_least"):
            if not all(map(math.isfinite, getattr(self, name))):
                raise InputError(f"--{name.replace('_', '-')}: must be finite")
        if not 0 <= self.reference_quantile <= 1:
            raise InputError(
                f"reference_quantile {self.reference_quantile}: must be from 0 to 1"
            )

    def check(self) -> None:
        """Checks what depends on the rewards, before any of them is read.

        Raises:
          InputError: if there is no reward, or options do not fit the rewards.
        """
        if not self.reward:
            raise InputError("--reward: name at least one reward")
        if len(set(self.reward)) < len(self.reward):
            raise InputError("--reward: the same reward is given twice; use --weights")
        self._check_numbers()
        self._check_readers()

    def _check_numbers(self) -> None:
        """That there are as many weights and thresholds as rewards."""
        if self.weights and self.weights_field is not None:
            raise InputError("--weights-field: leave out --weights")
        if self.weights and len(self.weights) != len(self.reward):
            raise InputError(
                f"--weights: {len(self.weights)} numbers for {len(self.reward)} "
                "rewards; give one for each"
            )
        constrained = self.combine == "constrained"
        if constrained and (self.weights or self.weights_field is not None):
            raise InputError("--weights: --combine constrained finds them itself")
        bound = self.combine == "lower_bound"
        if bound and (self.weights or self.weights_field is not None):
            raise InputError("--weights: --combine lower_bound takes the mean")
        if (constrained or bound) and len(self.reward) < 2:
            raise InputError(f"--combine {self.combine}: needs a second --reward")
        if constrained and len(self.at_least) != len(self.reward) - 1:
            raise InputError(
                f"--at-least: {len(self.at_least)} numbers; give one for each of the "
                f"{len(self.reward) - 1} rewards after the first"
            )

    def _check_readers(self) -> None:
        """That something reads each option that was given."""
        default = RewardOptions()
        for name, words in READERS.items():
            if getattr(self, name) != getattr(default, name) and not any(
                word == reader or (reader.endswith(":") and word.startswith(reader))
                for word in (*self.reward, f"--combine {self.combine}")
                for reader in words
            ):
                flag, reads = name.replace("_", "-"), "read" + "s" * (len(words) == 1)
                raise InputError(f"--{flag}: only {' and '.join(words)} {reads} it")


READERS = {
    "reference_quantile": ("--combine log_sigmoid",),
    "at_least": ("--combine constrained",),
    "constraint_beta": ("--combine constrained",),
    "std_weight": ("--combine lower_bound",),
    "answer_field": ("rule:exact", "rule:number"),
    "tests_field": ("rule:code",),
    "allow_code_execution": ("rule:code",),
    "follow_up_model": ("follow-up:",),
    "principle": ("judge:",),
}
"""The rewards and the combinations that read an option; with a colon at the end, all
words that begin with it."""
