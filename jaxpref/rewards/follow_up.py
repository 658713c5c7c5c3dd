"""How likely a user's reaction is after an answer."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpref import data
from jaxpref.data.records import Example, text_of
from jaxpref.data.template import render_template
from jaxpref.errors import InputError
from jaxpref.models.weights import Weights, is_reward, resolve_weights
from jaxpref.rewards.answered import Answered
from jaxpref.rewards.models import ModelOptions, as_sampled, in_memory, score


@dataclasses.dataclass(frozen=True)
class FollowUp:
    """log p(follow-up | prompt, answer) of a language model, in nats.

    An answer after which a pleased reaction is likely is probably a good one: FLR,
    arXiv:2409.13948.  In a conversation, the follow-up is the user's next turn.
    """

    name: str
    """As the user wrote it."""
    weights: Weights
    text: str
    """What the user might say."""
    options: ModelOptions
    params: Any = None
    """The model's parameters; None to load them in each call."""

    def loaded(self) -> "FollowUp":
        """The same reward with the model in memory, for many calls."""
        params, options = in_memory(self.weights, self.options)
        return dataclasses.replace(self, params=params, options=options)

    def __call__(self, answered: Sequence[Answered]) -> list[Float[np.ndarray, " K"]]:
        """See `Reward`."""
        tokenizer = data.load_tokenizer(self.weights.folder, self.options.template)
        asked = [
            self._asked(one, k, tokenizer)
            for one in answered
            for k in range(len(one.texts))
        ]
        about = "policy_logps", asked, self.options, self.name
        logps = iter(score(self.weights, *about, params=self.params))
        return [np.array([next(logps)[0] for _ in one.texts]) for one in answered]

    def _asked(self, answered: Answered, k: int, tokenizer: Any) -> Answered:
        """The dialogue up to the follow-up, as a prompt, and the follow-up."""
        example = as_sampled(answered, tokenizer).alone(k)
        if isinstance(example.prompt, str):
            answer = text_of(example.completions[0])
            before = f"{example.prompt}{answer}\n\n"
        else:
            user = {"role": "user", "content": self.text}
            render = functools.partial(
                render_template, place=answered.place, tokenizer=tokenizer
            )
            messages = [*example.prompt, example.completions[0], user]
            whole = render(messages, open_answer=False, **example.variables)
            before = whole[: whole.rfind(self.text)]
        return Answered(Example(before, (self.text,)), {}, answered.place)


def follow_up(text: str, folder: str | None, options: ModelOptions) -> FollowUp:
    """The likelihood of a follow-up.

    Args:
      text: what the user might say.
      folder: a language model's folder or Hub ID.
      options: how the model computes it.

    Raises:
      InputError: if there is no text or no language model.
    """
    written = f"--reward follow-up:{text}"
    if not text.strip():
        raise InputError(f"{written}: write what a user might say")
    if folder is None:
        raise InputError(f"{written}: name a language model with --follow-up-model")
    weights = resolve_weights(folder, None)
    if is_reward(weights):
        raise InputError(f"--follow-up-model {folder}: is a reward model; name another")
    return FollowUp(f"follow-up:{text}", weights, text.strip(), options)
