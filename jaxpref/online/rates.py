"""The error rates of a verifier: one number for all prompts, or one for each."""

from collections.abc import Sequence

from jaxpref import data
from jaxpref.data.columns import FLAG, read_columns
from jaxpref.errors import InputError
from jaxpref.train.config import TrainConfig

RATES = ("false_positive_rate", "false_negative_rate")


def named_rates(config: TrainConfig) -> dict[str, str]:
    """The rates that the records give, and their fields."""
    return {k: x for k, x in config.options.named_columns.items() if k in RATES}


def given_rates(config: TrainConfig) -> list[str]:
    """The rates that are given, as options."""
    options, named = config.objective.options, named_rates(config)
    return [
        f"{FLAG} {name}={named[name]}"
        if name in named
        else f"--objective.{name.replace('_', '-')}"
        for name in RATES
        if options.get(name)
    ]


def rates_of(
    prompts: Sequence[data.Prompt], config: TrainConfig
) -> list[dict[str, float]]:
    """The rates that the records give for each prompt, by name.

    Raises:
      InputError: if one is missing or outside [0, 1], or the rates of a prompt add up
        to 1 or more.
    """
    named = named_rates(config)
    options = config.objective.options
    fixed = {
        f"--objective.{name.replace('_', '-')}": value
        for name in RATES
        if name not in named and (value := options.get(name))
    }
    found = []
    for prompt in prompts:
        own = read_columns(prompt.source_record, prompt.place, named)
        total = sum(fixed.values()) + sum(own.values())
        if own and not (min(own.values()) >= 0 and total < 1):
            given = {f"field '{named[name]}'": x for name, x in own.items()} | fixed
            raise InputError(
                f"{prompt.place}: the rates of a verifier's errors must be 0 or more, "
                "and their sum below 1, but they are "
                f"{' and '.join(f'{x:g} ({name})' for name, x in given.items())}; "
                "correct them"
            )
        found.append(own)
    return found
