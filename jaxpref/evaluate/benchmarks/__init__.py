"""Published benchmarks, recognized by their records, and scored by their own rules.

To add a benchmark, write a function of rewards and fields of the records, and add it to
`BENCHMARKS`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxpref.data import PreferenceDataset, Source
from jaxpref.evaluate.benchmarks import reward_bench, reward_bench_2, rm_bench, subsets
from jaxpref.evaluate.groups import record_fields

Fields = Sequence[Mapping[str, Any]]
"""The fields of each record in the file."""
Rewards = Float[np.ndarray, "records answers"]
Exists = Bool[np.ndarray, "records answers"]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark."""

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    """Whether the fields of a record are those of this benchmark."""
    score: Callable[[Rewards, Exists, Fields], dict[str, float]]
    """`score(rewards, exists, fields)`: scores by section, and `overall`.  Answers are
    in order, the right ones first."""
    lists: bool = False
    """Whether its records are lists of answers, and not pairs."""


BENCHMARKS = (
    Benchmark("RewardBench 2", reward_bench_2.matches, reward_bench_2.score, True),
    Benchmark("RM-Bench", rm_bench.matches, rm_bench.score, True),
    Benchmark("RewardBench", reward_bench.matches, reward_bench.score),
    Benchmark("JudgeBench", subsets.is_judge_bench, subsets.judge_bench),
    Benchmark("LLMBar", subsets.is_llmbar, subsets.llmbar),
    Benchmark("HHH", subsets.is_hhh, subsets.hhh),
    Benchmark("PrefEval", subsets.is_prefeval, subsets.prefeval, True),
    Benchmark("RAG-RewardBench", subsets.is_rag, subsets.rag),
)
"""All benchmarks; the first that matches all records scores them."""


def benchmark_scores(
    source: Source, records: PreferenceDataset, rewards: Rewards
) -> dict[str, Any] | None:
    """The name and the scores of the benchmark that the records are; None for others.

    Args:
      source: the records in the file that `records` were read from.
      records: N records, as pairs or as lists.
      rewards: the reward of each answer, [N, K].
    """
    is_lists = "qualities" in records.columns
    if not is_lists and records.num_completions != 2:
        return None
    rows = records.columns["row"].tolist()
    first = record_fields(source[rows[0]])
    near = [x for x in BENCHMARKS if x.lists == is_lists and x.matches(first)]
    if not near:
        return None
    fields = [record_fields(source[row]) for row in rows]
    found = next((x for x in near if all(map(x.matches, fields))), None)
    if found is None:
        return None
    exists = records.completion_lengths > 0
    scores = found.score(rewards.astype(np.float64), exists, fields)
    return {"name": found.name, "scores": scores}
