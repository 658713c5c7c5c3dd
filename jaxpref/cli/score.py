"""`jaxpref score`."""

from collections.abc import Sequence

from jaxpref.cli import help
from jaxpref.cli.options import Option, Part, options_of, parse
from jaxpref.cli.words import split
from jaxpref.rewards import RewardOptions
from jaxpref.rewards import command as score
from jaxpref.rewards.uncertain_command import UncertaintyOptions

COMMAND = "jaxpref score"
PARTS = {
    "config": Part(score.ScoreConfig),
    "rewards": Part(RewardOptions),
    "uncertain": Part(UncertaintyOptions),
}


def command(argv: Sequence[str]) -> None:
    """Computes the rewards of answers."""
    given = split(argv, repeatable=("reward",))
    made = parse(PARTS, given, command=COMMAND)
    score.run(made.config, made.rewards, made.uncertain)


def options() -> dict[str, Option]:
    """All options of the command."""
    return options_of(PARTS)


def help_text(argv: Sequence[str]) -> str:
    """The help of the command."""
    return help.command(COMMAND, options())
