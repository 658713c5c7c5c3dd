"""Several different answers in one reply (negatively correlated sampling).

Samples of one prompt resemble each other, and so do the preferences that can be learned
from them.  A model that is asked for all answers at once can make each of them differ
from those before it.  Zhang et al. 2025, arXiv:2507.09650, section 4; the wording of
the instruction is our own.
"""

import re
from typing import Any

from jaxpref import data
from jaxpref.errors import InputError
from jaxpref.evaluate.sampled import Sampled
from jaxpref.runtime.processes import log

INSTRUCTION = """\
Write {n} answers to the message below. They must differ as much as possible in the \
values and views that they express, so that people who disagree with each other would \
prefer different ones. Do not compare them, and write nothing else. Begin each answer \
with a line that says "### Answer" and its number.

{message}"""
HEADING = re.compile(
    r"^[#* ]*Answer (\d+)(?:[:.* ]*\r?$|\**:\**)", re.MULTILINE | re.IGNORECASE
)
"""A line of its own, or before the text of the answer with a colon."""


def asked(prompt: data.Prompt, n: int, tokenizer: Any, max_length: int) -> data.Prompt:
    """The prompt with an instruction to write n different answers.

    Raises:
      InputError: if the prompt does not end with a user's text, or is too long.
    """
    reword = lambda message: INSTRUCTION.format(n=n, message=message)
    return data.reworded(prompt, reword, tokenizer, max_length, "--diverse")


def split(reply: Sampled, n: int) -> list[Sampled]:
    """The answers in a reply, up to n; none if it has no headings.

    Headings are numbered 1, 2, ...; others are part of an answer.  Log-probabilities
    are None: an answer is drawn given those before it.
    """
    heads: list[re.Match[str]] = []
    for head in HEADING.finditer(reply.text):
        if int(head[1]) == len(heads) + 1:
            heads.append(head)
    ends = [*(head.start() for head in heads[1:]), len(reply.text)]
    found = [
        # All but the last one are complete.
        Sampled(text, None, reply.ended or end < len(reply.text))
        for head, end in zip(heads, ends)
        if (text := reply.text[head.end() : end].strip())
    ]
    return found[:n]


def split_all(
    prompts: list[data.Prompt], replies: list[Sampled], n: int
) -> tuple[list[data.Prompt], list[list[Sampled]]]:
    """The prompts with answers, and the answers; says how many replies have fewer.

    Raises:
      InputError: if no reply can be split.
    """
    outputs = [split(reply, n) for reply in replies]
    kept = [number for number, own in enumerate(outputs) if own]
    if not kept:
        raise InputError(
            "--diverse: no reply has the headings that it was asked for; use a model "
            "that follows instructions, or a larger --max-new-tokens"
        )
    fewer = sum(len(own) < n for own in outputs)
    if fewer:
        none = len(outputs) - len(kept)
        log(
            f"--diverse: {fewer:,} of {len(outputs):,} replies have fewer than {n} "
            f"answers; {none:,} of these have none and are dropped"
        )
    return [prompts[number] for number in kept], [outputs[number] for number in kept]
