"""Benchmarks that are scored by the accuracy of each subset.

JudgeBench, LLMBar, the HHH evaluation, PrefEval's multiple-choice questions, and
RAG-RewardBench.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

Fields = Sequence[Mapping[str, Any]]
Rewards = Float[np.ndarray, "records answers"]
Exists = Bool[np.ndarray, "records answers"]

JUDGE_BENCH = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}
"""The section of a source, by how its name begins."""
RAG = {"helpful", "harmless", "reason", "citation", "abstain", "conflict"}


def is_judge_bench(fields: Mapping[str, Any]) -> bool:
    """Whether a record is one of JudgeBench."""
    return {"response_A", "response_B", "label", "source"} <= fields.keys()


def judge_bench(rewards: Rewards, exists: Exists, fields: Fields) -> dict[str, float]:
    """The accuracy of each section and of all pairs; a tie is wrong.

    References:
      Tan et al., "JudgeBench", 2024, arXiv:2410.12784.
      ScalerLab/JudgeBench, utils/metrics.py.
    """
    names = [_judge_bench_section(str(x["source"])) for x in fields]
    return _by_subset(_first_is_best(rewards, exists, ties=0.0), names)


def _judge_bench_section(source: str) -> str:
    near = (x for start, x in JUDGE_BENCH.items() if source.startswith(start))
    return next(near, source)


def is_llmbar(fields: Mapping[str, Any]) -> bool:
    """Whether a record is one of LLMBar."""
    return {"input", "output_1", "output_2", "label"} <= fields.keys()


def llmbar(rewards: Rewards, exists: Exists, fields: Fields) -> dict[str, float]:
    """The accuracy of each `subset`, if the records name it, and of all pairs.

    A tie counts 1/2, like a judge that prefers the first answer in both orders.

    References:
      Zeng et al., "Evaluating Large Language Models at Evaluating Instruction
      Following", 2023, arXiv:2310.07641.
    """
    return _by_subset(_first_is_best(rewards, exists), _subsets(fields))


def is_hhh(fields: Mapping[str, Any]) -> bool:
    """Whether a record is one of the HHH evaluation."""
    return isinstance(fields.get("targets"), Mapping) and "input" in fields


def hhh(rewards: Rewards, exists: Exists, fields: Fields) -> dict[str, float]:
    """The accuracy of each `subset`, if the records name it, and of all pairs.

    References:
      Askell et al., "A General Language Assistant as a Laboratory for Alignment", 2021,
      arXiv:2112.00861.
    """
    return _by_subset(_first_is_best(rewards, exists), _subsets(fields))


def is_prefeval(fields: Mapping[str, Any]) -> bool:
    """Whether a record is a multiple-choice question of PrefEval."""
    return {"preference", "classification_task_options"} <= fields.keys()


def prefeval(rewards: Rewards, exists: Exists, fields: Fields) -> dict[str, float]:
    """How often the option that follows the preference has the highest reward.

    References:
      Zhao et al., "Do LLMs Recognize Your Preferences?", 2025, arXiv:2502.09597, the
      classification task.
    """
    return _by_subset(_first_is_best(rewards, exists), _subsets(fields))


def is_rag(fields: Mapping[str, Any]) -> bool:
    """Whether a record names a subset of RAG-RewardBench, after its files."""
    subset = fields.get("subset")
    return isinstance(subset, str) and subset in RAG


def rag(rewards: Rewards, exists: Exists, fields: Fields) -> dict[str, float]:
    """The accuracy of each subset and of all pairs.

    References:
      Jin et al., "RAG-RewardBench", 2024, arXiv:2412.13746.
    """
    return _by_subset(_first_is_best(rewards, exists), _subsets(fields))


def _first_is_best(
    rewards: Rewards, exists: Exists, *, ties: float | None = None
) -> Float[np.ndarray, " records"]:
    """1 if the first answer alone has the highest reward; if n do, `ties` or 1/n."""
    masked = np.where(exists, rewards, -np.inf)
    top = masked == masked.max(axis=1, keepdims=True)
    count = top.sum(axis=1)
    shared = 1 / count if ties is None else np.where(count > 1, ties, 1.0)
    return np.where(top[:, 0], shared, 0.0)


def _subsets(fields: Fields) -> list[str]:
    return [str(x.get("subset") or "") for x in fields]


def _by_subset(
    points: Float[np.ndarray, " records"], names: Sequence[str]
) -> dict[str, float]:
    """The mean of each named subset, and of all records."""
    own = np.array(names)
    found = {str(x): float(points[own == x].mean()) for x in np.unique(own) if x}
    return found | {"overall": float(points.mean())}
