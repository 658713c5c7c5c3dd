"""Rewards from a Python function of the user's."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Float

from jaxpref.errors import InputError, first_line
from jaxpref.rewards.answered import Answered


@dataclasses.dataclass(frozen=True)
class FunctionReward:
    """A function `(prompt, answer, record) -> number` of the user's."""

    name: str
    """As the user wrote it, for messages."""
    function: Callable[[Any, str, Mapping[str, Any]], float]
    """Its arguments are the prompt (a text or messages), the answer's text, and the
    record as it is in the file."""

    def __call__(self, answered: Sequence[Answered]) -> list[Float[np.ndarray, " K"]]:
        """See `Reward`.

        Raises:
          InputError: if the function raises an error, or does not return a number.
        """
        return [
            np.array([self._of(x, text) for text in x.texts], float) for x in answered
        ]

    def _of(self, answered: Answered, text: str) -> float:
        prompt = answered.example.prompt
        messages = prompt if isinstance(prompt, str) else list(prompt)
        where = f"{answered.place}: --reward {self.name}"
        try:
            value = self.function(messages, text, answered.record)
        except Exception as error:
            kind = type(error).__name__
            raise InputError(f"{where}: raised {kind}: {first_line(error)}") from error
        try:
            return float(value)
        except (TypeError, ValueError):
            raise InputError(
                f"{where}: must return a number, but returned {value!r:.50}"
            ) from None


def function_reward(word: str) -> FunctionReward:
    """The function `module:function`, of a module that Python finds.

    The current folder is searched only if PYTHONPATH names it; see docs/trust.md.

    Raises:
      InputError: if it cannot be imported, or is no function.
    """
    module_name, _, name = word.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module runs as it is imported
        raise InputError(
            f"--reward {word}: cannot import {module_name} "
            f"({type(error).__name__}: {first_line(error)}); its folder must be in "
            "PYTHONPATH, as in PYTHONPATH=. jaxpref score"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(
            f"--reward {word}: {module_name} has no function {name}; write one: "
            f"def {name}(prompt, answer, record): return 0.0"
        )
    return FunctionReward(word, cast(Any, function))
