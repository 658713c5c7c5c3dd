r"""What do guides cost?  Tokens per second with 0, 1, 2, ... guides.

Every guide is the model itself, with a cache of its own and a weight of 0: it computes
as much as the model, and changes no token.

Command
        python -m benchmarks.inputs stories260k
        python -m benchmarks.guides --model inputs/stories260k-hf --json guides.json

Output
    For each number of guides, tokens per second of wall-clock time and per CPU second
    in the faster of --rounds passes, after one that compiles; and whether the tokens
    are those without guides.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.step import machine, made
from jaxpref.files import check_output, write_json
from jaxpref.models import build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.malloc import reuse_freed_memory
from jaxpref.sampling import Mixed, Mixture, Request, Rule, answer_all
from jaxpref.sampling.selection import greedy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the benchmark."""

    model: str
    """Hugging Face folder."""
    json: str
    """File for the results."""
    guides: int = 2
    """The largest number of guides."""
    prompts: int = 64
    """Number of prompts, of random tokens."""
    prompt_tokens: tuple[int, int] = (8, 32)
    """Minimum and maximum number of tokens of a prompt."""
    new_tokens: int = 64
    """Tokens of an answer."""
    batch_size: int = 32
    """Answers in progress."""
    rounds: int = 3
    """Passes over the prompts that are measured."""


def requests_of(options: Options) -> list[Request]:
    """The prompts."""
    rng = np.random.default_rng(0)
    vocabulary = read_architecture(Path(options.model)).vocab_size
    first, last = options.prompt_tokens
    return [
        Request(
            rng.integers(3, vocabulary, n).tolist(), (number, 0), options.new_tokens
        )
        for number, n in enumerate(rng.integers(first, last + 1, options.prompts))
    ]


def measure(options: Options, guides: int) -> tuple[dict[str, float], list[list[int]]]:
    """Tokens per second with some guides, and the answers."""
    requests = requests_of(options)
    model: Any = build(read_architecture(Path(options.model)))
    params: Any = load_params(Path(options.model), model)
    if guides:
        weights = jnp.array([1.0] + [0.0] * guides)
        params = Mixed((params,) * (1 + guides), weights)
        model = Mixture((model,) * (1 + guides))
    rule = Rule(jax.random.key(0), greedy(), jnp.zeros(0, jnp.int32))
    best, answers = {"second": 0.0, "cpu_second": 0.0}, {}
    for turn in range(options.rounds + 1):
        started, used = time.perf_counter(), sum(os.times()[:2])
        size = options.batch_size
        answers = dict(answer_all(model, params, requests, rule, batch_size=size))
        spent = time.perf_counter() - started, sum(os.times()[:2]) - used
        tokens = sum(len(answer.tokens) for answer in answers.values())
        if turn:  # the first one compiles
            each = zip(best.items(), spent, strict=True)
            best = {unit: max(old, tokens / new) for (unit, old), new in each}
    found = [answers[n].tokens for n in range(len(requests))]
    return {f"tokens_per_{unit}": value for unit, value in best.items()}, found


def main(options: Options) -> None:
    """Measures each number of guides; results are written after each."""
    check_output("--json", options.json, {"--model": made(options.model, "model")})
    reuse_freed_memory()
    written: dict[str, Any] = {"machine": machine(), "guides": {}}
    written["options"] = dataclasses.asdict(options)
    alone: list[list[int]] = []
    for guides in range(options.guides + 1):
        record, answers = measure(options, guides)
        alone = alone or answers
        written["guides"][guides] = record | {"same": answers == alone}
        write_json(options.json, written)
    print(json.dumps(written["guides"], indent=2))


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
