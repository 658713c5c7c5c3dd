"""Rewards as the user writes them."""

import re
from pathlib import Path

from jaxpref.errors import InputError
from jaxpref.models.weights import head_of, is_reward, resolve_weights
from jaxpref.rewards.code import CodeTests
from jaxpref.rewards.follow_up import follow_up
from jaxpref.rewards.functions import function_reward
from jaxpref.rewards.judge import judge_of
from jaxpref.rewards.models import (
    ModelOptions,
    attribute_reward,
    log_ratio,
    model_reward,
)
from jaxpref.rewards.options import RewardOptions
from jaxpref.rewards.preference import PreferenceReward
from jaxpref.rewards.reward import Reward
from jaxpref.rewards.rules import rule_of

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""`module:function`."""
OF_MODELS = ("attribute", "log-ratio", "follow-up", "judge")
"""Words before the first colon of rewards that models compute."""

DEFAULT = RewardOptions()


def reward_of(
    word: str, models: ModelOptions, options: RewardOptions = DEFAULT
) -> Reward:
    """The reward that a word names.

    Args:
      word: a reward model's folder or Hub ID, `attribute:NAME:DIR`, `rule:NAME`,
        `log-ratio:STRONG:WEAK`, `follow-up:TEXT`, `judge:DIR`, or `module:function`.
      models: how models compute rewards.
      options: what rewards of some kinds read.

    Raises:
      InputError: if it names none.
    """
    kind, _, rest = word.partition(":")
    if kind == "rule":
        name, _, argument = rest.partition(":")
        if name == "code":
            return _code_tests(word, options)
        return rule_of(name, argument, field=options.answer_field)
    if kind == "attribute":
        name, colon, folder = rest.partition(":")
        if not (name and colon and folder):
            raise InputError(
                f"--reward {word}: name the attribute and the model: attribute:NAME:DIR"
            )
        return attribute_reward(name, folder, models)
    if kind == "log-ratio":
        strong, colon, weak = rest.partition(":")
        if not (strong and colon and weak):
            raise InputError(
                f"--reward {word}: name two language models: log-ratio:STRONG:WEAK"
            )
        return log_ratio(strong, weak, models)
    if kind == "follow-up":
        return follow_up(rest, options.follow_up_model, models)
    if kind == "judge":
        return judge_of(rest, models, principle=options.principle or "")
    if reads_no_model(word):
        return function_reward(word)
    weights = resolve_weights(word, None)
    if is_reward(weights) and head_of(weights).embedding:
        return PreferenceReward(word, weights, models)
    return model_reward(word, models)


def reads_no_model(word: str) -> bool:
    """Whether a reward is a rule or a function, which `reward_of` makes at once."""
    kind, _, _ = word.partition(":")
    if kind in OF_MODELS or Path(word).exists():
        return False
    return kind == "rule" or FUNCTION.fullmatch(word) is not None


def _code_tests(word: str, options: RewardOptions) -> CodeTests:
    if word != "rule:code":
        raise InputError(f"--reward {word}: takes no argument; write rule:code")
    if not options.allow_code_execution:
        raise InputError(
            "--reward rule:code: runs code that a model wrote, with limits on time, "
            "memory and files only; pass --allow-code-execution to run it, preferably "
            "in a container (docs/trust.md)"
        )
    return CodeTests(options.tests_field)
