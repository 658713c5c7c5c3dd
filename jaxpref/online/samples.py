"""Sampled answers with their rewards, written to `OUT/samples.jsonl`."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxpref import data
from jaxpref.online.answers import Group
from jaxpref.runtime import samples_file


class SamplesFile:
    """The answers to the first prompts of a sample, a line each.

    A line has the `step` as in `metrics.jsonl`, the prompt's `id`, the `prompt` (its
    `text`), the `output`, the sum `logp` of its log-probabilities in nats, whether it
    `ended` with a stop token, and its `reward`, or null.
    """

    def __init__(self, out: Path, *, count: int, sampled: int):
        """Drops what a killed run wrote after its checkpoint.

        Args:
          out: the run's folder.
          count: prompts to write of each sample.
          sampled: the last step that learns from answers that the run already has;
            lines of later ones are dropped.
        """
        self._path, self._count = out / samples_file.FILE, count
        samples_file.keep_before(self._path, sampled + 1)

    def write(
        self,
        step: int,
        groups: Sequence[Group],
        texts: Sequence[Sequence[str]],
        rewards: Float[np.ndarray, "B K"],
        prompts: Sequence[data.Prompt],
    ) -> None:
        """Appends the answers of a sample."""
        if not self._count:
            return
        found = list(zip(groups, texts, rewards.tolist(), strict=True))
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
            for group, outputs, own in found[: self._count]
            for answer, output, reward in zip(group.answers, outputs, own)
        ]
        samples_file.append(self._path, lines)
