"""Greedy answers to a few held-out prompts at each evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxpref import data
from jaxpref.data.answer_text import decode_continuation
from jaxpref.errors import InputError
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.soft_prompt import SoftPrompt
from jaxpref.runtime import samples_file
from jaxpref.runtime.processes import broadcast_from_process_zero
from jaxpref.sampling import Answers
from jaxpref.sampling.together import answer_logps, greedy_answers
from jaxpref.train.task import Task

UNSEEN = "eval_logps/unseen"


class Samples:
    """Writes answers to `OUT/samples.jsonl`, a line for each prompt and evaluation.

    A line has the `step`, the held-out pair's `id`, its `prompt`, the `output`, its
    `tokens`, the sum `logp` of its log-probabilities in nats, and whether it `ended`
    with a stop token.
    """

    def __init__(self, task: Task, out: Path, *, count: int, tokens: int, start: int):
        """For `count` prompts, and answers of at most so many `tokens`.

        Lines from the step `start` on, at which the run resumes, are dropped.
        """
        self._task, self._path = task, out / samples_file.FILE
        self._tokens, heldout = tokens, task.datasets.splits.heldout
        self._rows = first_prompts(task, count=count, tokens=tokens)
        self._prompts = [heldout.context(n, 0).tolist() for n in self._rows]
        self._tokenizer: Any = None
        kept = []
        if self._rows and jax.process_index() == 0:
            kept = samples_file.keep_before(self._path, start)
        ids = [str(heldout.ids[n]) for n in self._rows]
        first = answers_before_training(kept, ids, tokens)
        if self._rows:
            first = broadcast_from_process_zero(first)
        self._first = [[x for x in row if x >= 0] for row in first.tolist()]

    def write(self, step: int, params: Any, frozen: Any) -> dict[str, float]:
        """Answers all prompts with the current parameters, on all processes.

        Returns:
          `eval_logps/unseen`: the mean log-probability, in nats, of the answers before
          training.  No pair holds them, so that training moves them only along with
          other answers (the dispersion of arXiv:2406.07327).
        """
        if not self._rows:
            return {}
        policy = *self._task.scorer.policy(params, frozen), self._prompts
        shape: Any = {"mesh": self._task.mesh, "max_new_tokens": self._tokens}
        stops = self._task.export.stop_tokens
        found = jax.device_get(greedy_answers(*policy, stop_tokens=stops, **shape))
        new = [x[:n].tolist() for x, n in zip(found.tokens, found.counts)]
        self._first = self._first if step else new[: len(self._rows)]
        if jax.process_index() == 0:
            self._append(step, found, new)
        if not all(self._first):
            return {}  # of other options, or of an earlier version
        logps = answer_logps(*policy, self._first, **shape)
        return {UNSEEN: float(logps.mean())}

    def _append(self, step: int, found: Answers, new: list[list[int]]) -> None:
        """Adds a line for each prompt."""
        part = getattr(self._task.scorer, "partition", None)
        # Placeholders of a soft prompt stand for no text.
        before = part.length if isinstance(part, SoftPrompt) else 0
        source, heldout = self._task.export.source, self._task.datasets.splits.heldout
        self._tokenizer = self._tokenizer or data.load_tokenizer(source)
        lines = []
        for n, (row, prompt) in enumerate(zip(self._rows, self._prompts)):
            prompt = prompt[before:]
            lines.append({
                "step": step,
                "id": str(heldout.ids[row]),
                "prompt": self._tokenizer.decode(prompt, skip_special_tokens=True),
                "output": decode_continuation(self._tokenizer, prompt, new[n]),
                "logp": float(found.logps[n]),
                "ended": bool(found.ended[n]),
                "tokens": new[n],
            })  # fmt: skip
        samples_file.append(self._path, lines)


def answers_before_training(
    lines: Sequence[Mapping[str, Any]], ids: Sequence[str], tokens: int
) -> Int[np.ndarray, "prompts tokens"]:
    """The tokens of the answers at step 0 to the pairs `ids`, padded with -1.

    A row has none if `lines` lack its answer or it has more than `tokens`: a resumed
    run may have other --eval-samples and --eval-sample-tokens.
    """
    answers = {x.get("id"): x.get("tokens", ()) for x in lines if x["step"] == 0}
    found = np.full((len(ids), tokens), -1, np.int32)
    for row, id in zip(found, ids):
        if len(own := answers.get(id, ())) <= tokens:
            row[: len(own)] = own
    return found


def first_prompts(task: Task, *, count: int, tokens: int) -> list[int]:
    """The held-out records of the first `count` different prompts.

    Raises:
      InputError: if there are no held-out pairs, or answers may be too long.
    """
    heldout = task.datasets.splits.heldout
    _, first = np.unique(heldout.columns["prompt"], return_index=True)
    rows = sorted(first.tolist())[:count]
    if count and not rows:
        raise InputError(
            f"--eval-samples {count}: there are no held-out pairs; hold some out, or "
            "leave it out"
        )
    longest = max((len(heldout.context(n, 0)) for n in rows), default=0) + tokens
    limit = read_architecture(task.export.source).context_length
    if rows and longest > limit:
        raise InputError(
            f"--eval-sample-tokens {tokens}: with the longest prompt, these are "
            f"{longest} tokens, but the model has {limit} positions"
        )
    return rows
