"""Options of `jaxpref rounds`."""

import dataclasses

from jaxpref.errors import InputError
from jaxpref.runtime.ranges import at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """Options of `jaxpref rounds`, besides rewards and options of the commands."""

    recipe: str
    """Name of a recipe, or a file with one."""
    model: str
    """The model before training: a Hugging Face model folder or Hub ID."""
    prompts: str
    """A file or dataset whose prompts the model answers; each round gets other ones."""
    out: str
    """Folder to write; the same command continues there."""
    rounds: int = 3
    """Number of rounds.  More can be added later, with the same --prompts-per-round."""
    data: str | None = None
    """Labeled pairs, for recipes that start from them and for --mix-offline."""
    weak_model: str | None = None
    """The weaker model of delta learning."""
    prompts_per_round: int | None = None
    """Prompts of each round (default: an equal part of all, so that each is used
    once)."""
    same_prompts: bool = False
    """Use all prompts in every round."""
    eval_prompts: int = 64
    """Prompts that are held out; the model of each round answers them for the report.
    At most a quarter of all prompts, but at least one.  0: no report on answers."""
    gold: str | None = None
    """A reward as for --reward that judges the held-out answers and the labels, and
    that no round trains on (default: --reward).  Its options are --gold.OPTION, as
    those of jaxpref score."""
    mix_offline: float = 0.0
    """Share of each training batch from --data, and not from the round's own pairs."""
    carry_optimizer: bool = False
    """Start each round's training from the final optimizer state of the previous
    round, such as Adam's moments, instead of from zeros (train --optimizer-from)."""
    seed: int = 0
    """Which prompts are held out, their order, and the random numbers of sampling."""
    dry_run: bool = False
    """Print the commands, and run nothing."""

    def __post_init__(self):
        at_least(1, self, "rounds", "prompts_per_round")
        at_least(0, self, "eval_prompts")
        if self.same_prompts and self.prompts_per_round is not None:
            raise InputError(
                "--same-prompts: every round gets all prompts; leave out "
                "--prompts-per-round"
            )
        if not 0 <= self.mix_offline < 1:
            raise InputError(
                f"--mix-offline {self.mix_offline}: must be at least 0 and below 1"
            )
        if self.mix_offline and self.data is None:
            raise InputError(
                f"--mix-offline {self.mix_offline}: needs --data, the pairs to mix in"
            )
