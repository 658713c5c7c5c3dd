"""Sampled answers with their rewards: `OUT/samples.jsonl`, `OUT/eval_samples.jsonl`."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxpref import data
from jaxpref.online.answers import Group
from jaxpref.runtime import samples_file
from jaxpref.runtime.processes import only_first_process


class SamplesFile:
    """Answers to prompts, a line each, written by process 0.

    A line has the `step` as in `metrics.jsonl`, the prompt's `id`, the `prompt` (its
    `text`), the `output`, the sum `logp` of its log-probabilities in nats, whether it
    `ended` with a stop token, and its `reward`, or null.
    """

    def __init__(self, path: Path, *, before: int):
        """Drops what a killed run wrote after its checkpoint.

        Args:
          path: the file.
          before: lines of this step and of later ones are dropped, because the run
            writes them again.
        """
        self._path = path
        only_first_process(samples_file.keep_before, path, before)

    def write(
        self,
        step: int,
        groups: Sequence[Group],
        texts: Sequence[Sequence[str]],
        rewards: Float[np.ndarray, "B K"],
        prompts: Sequence[data.Prompt],
    ) -> None:
        """Appends the answers to the prompts of some groups."""
        found = zip(groups, texts, rewards.tolist(), strict=True)
        lines = [
            {
                "step": step,
                "id": prompts[group.index].place,
                "prompt": prompts[group.index].text,
                "output": output,
                "logp": answer.logp,
                "ended": answer.ended,
                "reward": reward if math.isfinite(reward) else None,
            }
            for group, outputs, own in found
            for answer, output, reward in zip(group.answers, outputs, own, strict=True)
        ]
        only_first_process(samples_file.append, self._path, lines)
