"""Answers to the prompts of a step, sampled from the current policy."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxpref import data
from jaxpref.data.answer_text import decode_continuation
from jaxpref.losses import overlong_penalty
from jaxpref.models import Model
from jaxpref.online.options import SamplingOptions
from jaxpref.rewards import Answered
from jaxpref.rewards.answered import assistant_turn
from jaxpref.rewards.reward import Reward
from jaxpref.runtime import heartbeat
from jaxpref.runtime.mesh import rows_for
from jaxpref.sampling import Answer, Request, Rule, answer_all
from jaxpref.sampling.selection import sample


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt and its answers."""

    index: int
    """Of the prompt in its data."""
    answers: tuple[Answer, ...]
    """K answers, as tokens."""


EVALUATION = 2**32 - 1
"""The number of every sample of held-out prompts; no sample of a step has it."""


def sample_groups(
    model: Model,
    params: Any,
    prompts: data.PreferenceDataset,
    indices: Sequence[int],
    *,
    number: int,
    first: int = 0,
    group_size: int,
    full: int,
    seed: int,
    stop_tokens: Sequence[int],
    sampling: SamplingOptions,
    mesh: jax.sharding.Mesh,
) -> list[Group]:
    """Samples K answers to each prompt, from softmax(logits).

    The tokens of an answer are a function of the parameters, the prompt, the seed, and
    the numbers of the sample, of the prompt's place in it and of the answer, as far as
    the logits are the same.  A prompt that is there twice thus gets different answers.

    Args:
      model: the model.
      params: its parameters.
      prompts: all prompts.
      indices: those to answer.
      number: of the sample: the step that it is drawn for, divided by the updates.
      first: the place of the first prompt in the sample.
      group_size: K.
      full: the most prompts of a call; calls with fewer use the same programs.
      seed: the run's.
      stop_tokens: the tokens that end an answer.
      sampling: the maximum length of answers, and how many are sampled at once.
      mesh: the devices.
    """
    most = sampling.max_new_tokens
    rule = Rule(
        jax.random.fold_in(jax.random.key(seed), np.uint32(number)),
        sample(1.0),
        jnp.asarray(tuple(stop_tokens), jnp.int32),
    )
    requests = [
        Request(prompts.prompt(n).tolist(), (first + place, k), most)
        for place, n in enumerate(indices)
        for k in range(group_size)
    ]
    rows = rows_for(full * group_size, sampling.sample_batch_size, mesh)
    # Later samples use the programs of this one.
    longest = Request([0] * int(prompts.prompt_lengths.max()), (0, 0), most)
    found: dict[int, Answer] = {}
    what = "to held-out prompts" if number == EVALUATION else f"of sample {number}"
    for n, answer in answer_all(
        model, params, requests, rule, batch_size=rows, largest=longest
    ):
        found[n] = answer
        heartbeat.beat(f"{len(found)} answers {what}")
    return [
        Group(n, tuple(found[place * group_size + k] for k in range(group_size)))
        for place, n in enumerate(indices)
    ]


def texts_of(
    groups: Sequence[Group], prompts: Sequence[data.Prompt], tokenizer: Any
) -> list[list[str]]:
    """The answers as text, for each prompt."""
    return [
        [
            decode_continuation(tokenizer, prompts[x.index].tokens, answer.tokens)
            for answer in x.answers
        ]
        for x in groups
    ]


def rewards_of(
    groups: Sequence[Group],
    texts: Sequence[Sequence[str]],
    prompts: Sequence[data.Prompt],
    reward: Reward,
) -> Float[np.ndarray, "B K"]:
    """The rewards of the answers; NaN for none.

    Raises:
      InputError: if the reward cannot be computed.
    """
    answered = [
        _answered(prompts[x.index], own, [a.ended for a in x.answers])
        for x, own in zip(groups, texts, strict=True)
    ]
    return np.stack(reward(answered)).astype(np.float32)


def overlong_penalties(
    groups: Sequence[Group], sampling: SamplingOptions
) -> Float[np.ndarray, "B K"]:
    """What `overlong_buffer` adds to the rewards of answers, from -1 to 0."""
    lengths = np.array([[len(a.tokens) for a in x.answers] for x in groups])
    if not sampling.overlong_buffer:
        return np.zeros(lengths.shape, np.float32)
    penalty = overlong_penalty(
        jnp.asarray(lengths),
        longest=sampling.max_new_tokens,
        buffer=sampling.overlong_buffer,
    )
    return np.asarray(penalty)


def _answered(
    prompt: data.Prompt, texts: Sequence[str], ended: Sequence[bool]
) -> Answered:
    """The answers as the rewards read them; messages if the prompt has these."""
    example = prompt.example
    turn = assistant_turn if example.is_conversation else lambda text: text
    example = dataclasses.replace(
        example,
        completions=tuple(map(turn, texts)),
        ended=tuple(ended),
        traces=(),
        own_prompts=(),
        turns=(),
    )
    return Answered(example, prompt.source_record, prompt.place, as_user=True)
