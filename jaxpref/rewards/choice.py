"""Rewards as the user writes them."""

import re
from pathlib import Path

from jaxpref.errors import InputError
from jaxpref.rewards.code import CodeTests
from jaxpref.rewards.follow_up import follow_up
from jaxpref.rewards.functions import function_reward
from jaxpref.rewards.judge import judge_of
from jaxpref.rewards.models import ModelOptions, log_ratio, model_reward
from jaxpref.rewards.options import RewardOptions
from jaxpref.rewards.reward import Reward
from jaxpref.rewards.rules import rule_of

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""`module:function`."""


DEFAULT = RewardOptions()


def reward_of(
    word: str, models: ModelOptions, options: RewardOptions = DEFAULT
) -> Reward:
    """The reward that a word names.

    Args:
      word: a reward model's folder or Hub ID, `rule:NAME`, `log-ratio:STRONG:WEAK`,
        `follow-up:TEXT`, `judge:DIR`, or `module:function`.
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
    if FUNCTION.fullmatch(word) and not Path(word).exists():
        return function_reward(word)
    return model_reward(word, models)


def _code_tests(word: str, options: RewardOptions) -> CodeTests:
    if word != "rule:code":
        raise InputError(f"--reward {word}: takes no argument; write rule:code")
    if not options.allow_code_execution:
        raise InputError(
            "--reward rule:code: runs the code in the answers, with limits on time and "
            "memory only; pass --allow-code-execution if the machine may be lost "
            "(docs/trust.md)"
        )
    return CodeTests(options.tests_field)
