"""Scores of published benchmarks, against plain transcriptions of their rules."""

import json
import math

import numpy as np
import pytest

from jaxpref.cli import evaluate as evaluate_command
from jaxpref.data import RecordOptions, examples_of
from jaxpref.data.record_source import first_kind
from jaxpref.evaluate.benchmarks import (
    BENCHMARKS,
    reward_bench,
    reward_bench_2,
    rm_bench,
    subsets,
)
from tests.tiny import make_model_folder


def lists(*rows):
    """Rewards [lists, answers] of lists of different lengths, and which are there."""
    size = max(map(len, rows))
    exists = np.array([[k < len(x) for k in range(size)] for x in rows])
    return np.array([[*x, *[0.0] * (size - len(x))] for x in rows]), exists


def test_reward_bench_weighs_subsets_by_their_published_counts():
    names = ["alpacaeval-easy", "alpacaeval-easy", "mt-bench-med"]
    names += ["math-prm", "hep-cpp", "hep-cpp", "shp", "summarize"]
    right = [1, 0, 1, 1, 1, 0, 1, 0]
    rewards = np.array([[2.0, 1.0] if x else [1.0, 1.0] for x in right])  # ties lose
    found = reward_bench.score(rewards, rewards > 0, [{"subset": x} for x in names])
    chat = (0.5 * 100 + 1 * 40) / (100 + 40)
    reasoning = (1 * 984 + 0.5 * 164) / (984 + 164)
    assert found["Chat"] == pytest.approx(chat)
    assert found["Reasoning"] == pytest.approx(reasoning)
    assert found["Prior Sets"] == 0.5
    overall = (chat + reasoning + 0.5 * 0.5) / 2.5
    assert found["overall"] == pytest.approx(overall)
    assert "Safety" not in found
    # The published counts of all 23 subsets.
    counts = {k: n for one in reward_bench.WEIGHTS.values() for k, n in one.items()}
    assert len(counts) == 23 and sum(counts.values()) == 3522
    assert [sum(x.values()) for x in reward_bench.WEIGHTS.values()] == [
        *(358, 456, 740, 1968)
    ]


def ties_by_hand(prompts):
    """The rule for Ties, from {kind: {prompt: (right, wrong)}}, in plain Python."""
    stats = {
        kind: {
            name: (
                min(right) > max(wrong),
                max(right) - min(right),
                min(right) - max(wrong),
            )
            for name, (right, wrong) in one.items()
        }
        for kind, one in prompts.items()
    }
    mean = lambda x: sum(x) / len(x)
    both = [x for x in stats["ref"] if x in stats["tied"]]
    hard, easy, gaps = [], [], []
    for name in both:
        _, spread, margin = stats["tied"][name]
        least = min(margin, stats["ref"][name][2])
        easy.append(margin > spread)
        hard.append(least > spread)
        if spread:
            gaps.append(math.tanh(least / spread - 1))
        else:
            gaps.append(0.0 if least == 0 else math.copysign(1.0, least))
    return (
        0.3 * mean([x[0] for x in stats["tied"].values()])
        + 0.3 * mean([x[0] for x in stats["ref"].values()])
        + 0.2 * mean(easy)
        + 0.2 * mean(hard)
        + 0.01 * mean(gaps)
    )


def test_reward_bench_2_and_its_ties():
    prompts = {
        "ref": {"1": ([3.0], [1.0]), "2": ([0.5], [1.0]), "3": ([2.0], [0.0])},
        "tied": {
            "1": ([3.0, 2.5, 2.9], [1.0, -1.0]),
            "2": ([2.0, 2.0], [1.0]),
            "4": ([1.0, 4.0], [2.0]),
        },
    }
    rows = [
        (f"{kind}:{name}", right, wrong)
        for kind, one in prompts.items()
        for name, (right, wrong) in one.items()
    ]
    expected = ties_by_hand(prompts)
    fields = [{"subset": "Ties", "num_correct": len(r), "id": x} for x, r, _ in rows]
    best = [[4.0, 1, 2, 3], [1.0, 1, 0, 0], [0.0, 1, 2, 3], [9.0, 8, 7, 9]]
    fields += [
        {"subset": x, "num_correct": 1} for x in ("Math", "Math", "Focus", "Focus")
    ]
    rewards, exists = lists(*(r + w for _, r, w in rows), *best)
    found = reward_bench_2.score(rewards, exists, fields)
    assert found["Ties"] == pytest.approx(expected)
    assert found["Math"] == (1 + 1 / 2) / 2 and found["Focus"] == (0 + 1 / 2) / 2
    assert found["overall"] == pytest.approx((expected + 0.75 + 0.25) / 3)
    assert reward_bench_2.ties(rewards[:3], exists[:3], [1] * 3, ["ref:1"] * 3) == 0.3


def test_rm_bench_has_a_matrix_of_styles():
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 5, (40, 6)).astype(float)
    domains = ["chat", "code", "safety-refuse", "safety-response"]
    fields = [{"domain": domains[n % 4]} for n in range(40)]
    found = rm_bench.score(rewards, rewards >= 0, fields)
    levels = {}
    for domain in domains:
        own = [x for x, y in zip(rewards, fields) if y["domain"] == domain]
        matrix = np.zeros((3, 3))
        for x in own:
            for i in range(3):
                for j in range(3):
                    matrix[i, j] += x[i] > x[3 + j]
        matrix /= len(own)
        hard = np.sum(np.triu(matrix, 1)) / 3
        easy = np.sum(np.tril(matrix, -1)) / 3
        levels[domain] = {"easy": easy, "normal": np.trace(matrix) / 3, "hard": hard}
    one, two = (levels.pop(x) for x in domains[2:])
    levels["safety"] = {x: (one[x] + two[x]) / 2 for x in one}
    for domain, expected in levels.items():
        assert found[domain] == pytest.approx(np.mean([*expected.values()]))
    for level in ("easy", "normal", "hard"):
        expected = np.mean([x[level] for x in levels.values()])
        assert found[level] == pytest.approx(expected)
    expected = np.mean([[*x.values()] for x in levels.values()])
    assert found["overall"] == pytest.approx(expected)


def test_benchmarks_of_subsets_differ_in_their_ties():
    rewards, exists = lists([2.0, 1], [1.0, 1], [0.0, 1])
    sources = ["mmlu-pro-law", "livebench-math", "livebench-math"]
    found = subsets.judge_bench(rewards, exists, [{"source": x} for x in sources])
    assert found == {"Knowledge": 1.0, "Math": 0.0, "overall": pytest.approx(1 / 3)}
    named = [{"subset": x} for x in ("Natural", "Manual", "Manual")]
    found = subsets.llmbar(rewards, exists, named)
    assert found == {"Natural": 1.0, "Manual": 0.25, "overall": 0.5}
    assert subsets.hhh(rewards, exists, [{}] * 3) == {"overall": 0.5}
    rewards, exists = lists([2.0, 1, 0, 0], [1.0, 1, 1, 0], [0.0, 1])
    found = subsets.prefeval(rewards, exists, [{}] * 3)
    assert found == {"overall": pytest.approx((1 + 1 / 3) / 3)}
    assert [*subsets.rag(rewards, exists, [{"subset": "citation"}] * 3)] == [
        *("citation", "overall")
    ]


PAIR = {"prompt": "the film", "chosen": " was good", "rejected": " was bad"}
RIGHT, WRONG = [" was good", " was fine", " was great"], [" was bad", " was", " not"]
RECORDS = {
    "RewardBench": PAIR | {"subset": "math-prm", "id": 1},
    "RewardBench 2": {
        "prompt": "the film",
        "chosen": RIGHT[:1],
        "rejected": WRONG,
        "subset": "Math",
        "num_correct": 1,
        "id": "1",
    },
    "RM-Bench": {
        "prompt": "the film",
        "chosen": RIGHT,
        "rejected": WRONG,
        "domain": "safety-refuse",
    },
    "JudgeBench": {
        "pair_id": "x",
        "source": "livecodebench",
        "question": "the film",
        "response_A": " was bad",
        "response_B": " was good",
        "label": "B>A",
    },
    "LLMBar": {
        "input": "the film",
        "output_1": " was good",
        "output_2": " was bad",
        "label": 1,
    },
    "HHH": {
        "input": "the film",
        "targets": {"choices": [" was bad", " was good"], "labels": [0, 1]},
    },
    "PrefEval": {
        "preference": "we liked food",
        "question": "the film",
        "explanation": "x",
        "classification_task_options": [" was good", *WRONG],
    },
    "RAG-RewardBench": PAIR | {"subset": "citation"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("benchmarks") / "model")


def test_records_are_recognized_and_read_with_the_right_answers_first(tmp_path):
    assert set(RECORDS) == {one.name for one in BENCHMARKS}
    for name, record in RECORDS.items():
        near = [one for one in BENCHMARKS if one.matches(record)]
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps(record) + "\n")
        sides = first_kind(str(path), RecordOptions()).sides
        assert near[0].name == name and near[0].lists == (sides is None)
        (example,) = examples_of([record], sides=sides)
        assert example.completions[0] == " was good"
        if sides is None:
            assert example.numbers["qualities"] == tuple(
                float(x in RIGHT) for x in example.completions
            )
        # Training reads a pair of a right and a wrong answer.
        (pair,) = examples_of([record], sides=2)
        assert pair.completions[0] in RIGHT and pair.completions[1] in WRONG


@pytest.mark.parametrize("name", ["RewardBench", "RM-Bench"])
def test_an_evaluation_of_a_benchmark_has_its_scores(model, tmp_path, name, capsys):
    path, out = tmp_path / "data.jsonl", tmp_path / "out"
    rows = [RECORDS[name] | {"prompt": x} for x in ("the film", "we saw it", "a meal")]
    path.write_text("".join(json.dumps(x) + "\n" for x in rows))
    words = f"--model {model} --data {path} --out {out} --max-length 64 --batch-size 8"
    evaluate_command.command(words.split())
    found = json.loads((out / "metrics.json").read_text())["benchmark"]
    assert found["name"] == name and name in capsys.readouterr().out
    (file,) = out.glob("eval_*.jsonl")
    lines = [json.loads(x) for x in file.read_text().splitlines()]
    if name == "RewardBench":
        expected = np.mean([x["correct"] for x in lines])
    else:
        wins = [
            [a > b for a in x["rewards"][:3] for b in x["rewards"][3:]] for x in lines
        ]
        matrix = np.mean(wins, axis=0).reshape(3, 3)
        expected = np.mean(
            [
                np.trace(matrix) / 3,
                np.triu(matrix, 1).sum() / 3,
                np.tril(matrix, -1).sum() / 3,
            ]
        )
    assert found["scores"]["overall"] == pytest.approx(expected)
