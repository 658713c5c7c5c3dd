"""`jaxpref sample`."""

from collections.abc import Sequence

from jaxpref.cli import help
from jaxpref.cli.options import Option, Part, options_of, parse
from jaxpref.cli.words import split
from jaxpref.evaluate import generations
from jaxpref.evaluate.sample_options import (
    AlignmentOptions,
    DirectionOptions,
    GuideOptions,
    SampleConfig,
)
from jaxpref.rewards import RewardOptions

COMMAND = "jaxpref sample"
PARTS = {
    "config": Part(SampleConfig),
    "guides": Part(GuideOptions),
    "alignment": Part(AlignmentOptions),
    "rewards": Part(RewardOptions),
    "directions": Part(DirectionOptions),
}


def command(argv: Sequence[str]) -> None:
    """Generates completions."""
    given = split(argv, repeatable=("guide", "guide-system", "reward"))
    made = parse(PARTS, given, command=COMMAND)
    generations.run(
        made.config, made.guides, made.alignment, made.rewards, made.directions
    )


def options() -> dict[str, Option]:
    """All options of the command."""
    return options_of(PARTS)


def help_text(argv: Sequence[str]) -> str:
    """The help of the command."""
    return help.command(COMMAND, options())
