"""Greedy answers to a few held-out prompts at each evaluation."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpref import data
from jaxpref.data.answer_text import decode_continuation
from jaxpref.errors import InputError
from jaxpref.files import open_to_append, write_whole
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.layout import num_parts
from jaxpref.models.soft_prompt import SoftPrompt
from jaxpref.sampling import Answers, generate, pad
from jaxpref.sharding import ROWS, replicated
from jaxpref.train.task import Task

FILE = "samples.jsonl"


class Samples:
    """Writes answers to `OUT/samples.jsonl`, a line for each prompt and evaluation.

    A line has the `step`, the held-out pair's `id`, its `prompt`, the `output`, the sum
    `logp` of its log-probabilities in nats, and whether it `ended` with a stop token.
    """

    def __init__(self, task: Task, out: Path, *, count: int, tokens: int, start: int):
        """Chooses the prompts: the first different ones.

        Args:
          task: what the run computes; it trains a language model.
          out: the run's folder.
          count: number of prompts; 0 to write nothing.
          tokens: maximum tokens of an answer.
          start: the step at which the run resumes; lines from then on are dropped.

        Raises:
          InputError: if there are no held-out pairs, or answers may be too long.
        """
        self._task, self._path, self._tokens = task, out / FILE, tokens
        heldout = task.datasets.splits.heldout
        _, first = np.unique(heldout.columns["prompt"], return_index=True)
        self._rows = sorted(first.tolist())[:count]
        self._ids = [str(heldout.ids[n]) for n in self._rows]
        self._prompts = [heldout.context(n, 0).tolist() for n in self._rows]
        self._tokenizer: Any = None
        if count:
            self._check(count)
        if self._rows and jax.process_index() == 0 and self._path.exists():
            # Not splitlines: an answer may hold other line breaks.
            lines = self._path.read_text("utf-8").split("\n")[:-1]
            kept = [f"{x}\n" for x in lines if json.loads(x)["step"] < start]
            write_whole(self._path, "".join(kept))

    def _check(self, count: int) -> None:
        if not self._rows:
            raise InputError(
                f"--eval-samples {count}: there are no held-out pairs; hold some out, "
                "or leave it out"
            )
        longest = max(map(len, self._prompts)) + self._tokens
        limit = read_architecture(self._task.export.source).context_length
        if longest > limit:
            raise InputError(
                f"--eval-sample-tokens {self._tokens}: with the longest prompt, these "
                f"are {longest} tokens, but the model has {limit} positions"
            )

    def write(self, step: int, params: Any, frozen: Any) -> None:
        """Answers all prompts with the current parameters, on all processes."""
        if not self._rows:
            return
        found = jax.device_get(self._answers(params, frozen))
        if jax.process_index() > 0:
            return
        source = self._task.export.source
        part = getattr(self._task.scorer, "partition", None)
        # Placeholders of a soft prompt stand for no text.
        before = part.length if isinstance(part, SoftPrompt) else 0
        self._tokenizer = self._tokenizer or data.load_tokenizer(source)
        with open_to_append(self._path) as file:
            for n, (name, prompt) in enumerate(zip(self._ids, self._prompts)):
                prompt = prompt[before:]
                new = found.tokens[n, : found.counts[n]].tolist()
                line = {
                    "step": step,
                    "id": name,
                    "prompt": self._tokenizer.decode(prompt, skip_special_tokens=True),
                    "output": decode_continuation(self._tokenizer, prompt, new),
                    "logp": float(found.logps[n]),
                    "ended": bool(found.ended[n]),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _answers(self, params: Any, frozen: Any) -> Answers:
        """The answers, whole on every device; the last prompt fills up the rows."""
        missing = -len(self._prompts) % num_parts(ROWS)
        tokens, lengths = pad(self._prompts + self._prompts[-1:] * missing)
        everywhere = NamedSharding(self._task.mesh, P())
        model, whole = self._task.scorer.policy(params, frozen)
        found = generate(
            model,
            whole,
            jax.device_put(np.asarray(tokens), everywhere),
            jax.device_put(np.asarray(lengths), everywhere),
            jax.random.key(0),
            max_new_tokens=self._tokens,
            temperature=0.0,
            stop_tokens=self._task.export.stop_tokens,
        )
        return jax.jit(lambda x: jax.tree.map(replicated, x))(found)
