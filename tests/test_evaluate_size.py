"""Metrics of 10,000 pairs whose scores are there take seconds."""

import time

import numpy as np
import pytest

from jaxpref import report
from jaxpref.data import DatasetBuilder, ListSource
from jaxpref.evaluate import evaluation
from jaxpref.evaluate.benchmarks import benchmark_scores
from jaxpref.evaluate.compare.length_control import length_controlled_win_rate
from jaxpref.evaluate.groups import by_group, group_values
from jaxpref.evaluate.paired import paired_metrics
from jaxpref.evaluate.results import PAIRS


@pytest.mark.slow
def test_ten_thousand_scored_pairs_are_evaluated_in_a_minute(tmp_path):
    count, rng = 10_000, np.random.default_rng(0)
    subsets = ["math-prm", "hep-go", "mt-bench-hard", "donotanswer"]
    records = ListSource([{"subset": subsets[n % 4], "n": n} for n in range(count)])
    builder = DatasetBuilder(2)
    for n in range(count):
        answers = [np.ones(int(x), int) for x in rng.integers(1, 9, 2)]
        builder.add([1], answers, id=f"{n}", columns={"row": n, "prompt": n // 2})
    pairs = builder.build()
    logps = rng.normal(-40, 9, (count, 2)).astype(np.float32)
    rewards, scores = 0.1 * logps, {"logps": logps, "reference_logps": 0 * logps}

    start = time.monotonic()
    metrics = PAIRS.metrics(pairs, rewards, scores)
    hits, prompts = PAIRS.hits(pairs, rewards), pairs.columns["prompt"]
    margins = rewards[:, 0] - rewards[:, 1]
    metrics["by"] = {
        field: by_group(
            group_values(records, pairs, field, "data"), hits, prompts, margins
        )
        for field in ("subset", "length-bin")
    }
    metrics["benchmark"] = benchmark_scores(records, pairs, rewards)
    other = paired_metrics(hits, rng.integers(0, 2, count).astype(float), prompts)
    metrics["against"] = {"model": "other", **other}
    lines = PAIRS.lines(pairs, rewards, scores)
    found = evaluation.Evaluation(metrics, lines, PAIRS)
    about = {"model": "m", "data": "d", "command": "c"}
    bins = evaluation.reliability(found)
    report.write_evaluation(tmp_path / "page.html", metrics, lines, bins, **about)
    lengths = pairs.completion_lengths.astype(float)
    length_controlled_win_rate(hits, *lengths.T)
    seconds = time.monotonic() - start
    print(f"{seconds:.1f} s")
    assert metrics["benchmark"]["name"] == "RewardBench"
    assert seconds < 60
