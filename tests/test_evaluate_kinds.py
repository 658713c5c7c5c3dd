"""Metrics of labeled answers and of lists, and `jaxpref evaluate` on files of them."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats

from jaxpref.cli import evaluate as evaluate_command
from jaxpref.data import first_kind
from jaxpref.data.kinds import LABELED, LISTS, PAIRS
from jaxpref.data.record_options import RecordOptions
from jaxpref.errors import InputError
from jaxpref.evaluate.answers import answer_metrics, weighted_auroc
from jaxpref.evaluate.audit_config import AuditConfig
from jaxpref.evaluate.audit_inputs import open_pairs
from jaxpref.evaluate.bootstrap import prompt_bootstrap
from jaxpref.evaluate.lists import chosen_qualities, list_metrics, per_list
from tests.tiny import make_model_folder


def area_under_curve(positive, scores, weights=None):
    """The share of weighted pairs of a positive and another in order; a tie is 1/2."""
    positive, scores = np.array(positive), np.array(scores)
    weights = np.ones(len(scores)) if weights is None else weights
    hits = (1 + np.sign(scores[positive][:, None] - scores[~positive])) / 2
    pairs = weights[positive][:, None] * weights[~positive]
    return np.sum(hits * pairs) / np.sum(pairs)


def draw_lists(seed, count=60):
    """Rewards and qualities with many ties, and which answers are there."""
    rng = np.random.default_rng(seed)
    rewards, qualities = rng.integers(0, 4, (2, count, 5)).astype(float)
    qualities[:, 0] = 5  # better than all others
    return rewards, qualities, np.arange(5) < rng.integers(2, 6, (count, 1))


def each(rewards, qualities, where):
    """(rewards, qualities) of the answers that are there, of each list."""
    for n, there in enumerate(where):
        yield rewards[n, there], qualities[n, there]


def test_correlations_of_ranks_are_those_of_scipy():
    lists = draw_lists(0)
    found = per_list(*lists)
    for n, (r, q) in enumerate(each(*lists)):
        tau, rho = 0.0, 0.0
        if np.ptp(r):
            tau = scipy.stats.kendalltau(r, q).statistic
            rho = scipy.stats.spearmanr(r, q).statistic
        assert found["kendall_tau"][n] == pytest.approx(tau, abs=1e-12)
        assert found["spearman"][n] == pytest.approx(rho, abs=1e-12)


def test_metrics_of_lists_are_those_of_their_definitions():
    lists = draw_lists(1)
    found = per_list(*lists)
    for n, (r, q) in enumerate(each(*lists)):
        hits = [
            np.mean([r[i] > r[j], r[i] >= r[j]])
            for i, j in itertools.permutations(range(len(r)), 2)
            if q[i] > q[j]
        ]
        assert found["accuracies"][n] == pytest.approx(np.mean(hits))
        top = r == r.max()
        assert found["top1"][n] == pytest.approx(np.mean(q[top] == q.max()))
        gain = (
            2 ** np.array([np.mean(np.delete(q, i) < x) for i, x in enumerate(q)]) - 1
        )
        rank = scipy.stats.rankdata(-r)
        ideal = np.sum(np.sort(gain)[::-1] / np.log2(2 + np.arange(len(r))))
        ndcg = np.sum(gain / np.log2(1 + rank)) / ideal
        assert found["ndcg"][n] == pytest.approx(ndcg)
    chosen, random, best = chosen_qualities(*lists)
    expected = [(q[r == r.max()].mean(), q.mean(), q.max()) for r, q in each(*lists)]
    np.testing.assert_allclose(np.array(expected).T, [chosen, random, best])


def test_the_order_of_the_answers_does_not_matter():
    rewards, qualities, _ = draw_lists(2)
    where = np.ones_like(rewards, bool)
    order = np.random.default_rng(2).permutation(5)
    moved = per_list(rewards[:, order], qualities[:, order], where)
    for name, values in per_list(rewards, qualities, where).items():
        np.testing.assert_allclose(moved[name], values, atol=1e-12)


def test_a_right_ranking_has_all_metrics_at_their_best():
    where = draw_lists(3)[2]
    # Without ties: equal rewards share the discount of their mean rank.
    qualities = np.tile(np.arange(5.0), (len(where), 1))
    right = list_metrics(qualities, qualities, where, np.arange(len(where)))
    names = ("accuracies", "kendall_tau", "spearman", "top1", "ndcg")
    for name in (*(f"rewards/{x}" for x in names), "best_of_n/gain"):
        ends = [right[f"{name}{end}"] for end in ("", "_low", "_high")]
        assert ends == pytest.approx([1, 1, 1])
    assert right["best_of_n/quality"] == right["best_of_n/best"]
    for shape in ((len(where), 4), (len(where),)):
        with pytest.raises(ValueError, match="equal shapes"):
            list_metrics(np.zeros(shape), qualities, where, np.arange(len(where)))
    with pytest.raises(ValueError, match="a best and a worse answer"):
        list_metrics(qualities, 0 * qualities, where, np.arange(len(where)))


def test_auroc_with_weights_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(4)
    scores, positive = rng.integers(0, 9, 50), rng.random(50) < 0.3
    area = weighted_auroc(scores, positive)
    for weights in (np.ones(50), rng.integers(0, 4, 50).astype(float)):
        expected = area_under_curve(positive, scores, weights)
        assert area(weights) == pytest.approx(expected)
    assert np.isnan(area(positive.astype(float)))


def test_accuracy_of_answers_is_at_the_threshold_midway_between_the_classes():
    rewards = np.array([4.0, 2.0, 1.0, 0.0, -2.0, 1.0])
    desirable = np.array([True, True, True, False, False, False])
    found = answer_metrics(rewards, desirable, np.arange(6))
    threshold = (7 / 3 + -1 / 3) / 2
    assert found["rewards/threshold"] == pytest.approx(threshold)
    # Both rewards of 1 are at the threshold: a tie counts half.
    assert found["rewards/accuracies"] == pytest.approx((2 + 2 + 0.5 + 0.5) / 6)
    assert found["rewards/auroc"] == pytest.approx(8.5 / 9)
    assert found["majority/accuracies"] == 0.5 and found["desirable"] == 0.5
    for wrong in (np.ones(6, bool), np.zeros(6, bool)):
        with pytest.raises(ValueError, match="both kinds"):
            answer_metrics(rewards, wrong, np.arange(6))


def test_intervals_are_of_prompts_and_not_of_their_records():
    """Repeating every record 9 times does not shorten the interval of a mean."""
    values = np.random.default_rng(5).normal(size=40)
    of = lambda x: lambda weights: {"mean": float(weights @ x / weights.sum())}
    prompts = np.arange(40)
    once = prompt_bootstrap(of(values), prompts)
    often = prompt_bootstrap(of(np.repeat(values, 9)), np.repeat(prompts, 9))
    for name in ("mean", "mean_low", "mean_high"):
        assert often[name] == pytest.approx(once[name])
    error = values.std() / np.sqrt(40)
    assert once["mean_high"] - once["mean_low"] == pytest.approx(3.92 * error, rel=0.1)


# ---- the command ---------------------------------------------------------------------

WORDS = (" was good", " was bad .", " was", " good good", " was very good .")


def answers(count):
    return [
        {
            "prompt": f"the film {n // 2} :",
            "completion": WORDS[n % 5],
            "label": n % 3 > 0,
        }
        for n in range(count)
    ]


def lists(count):
    return [
        {
            "prompt": f"the film {n} :",
            "completions": list(WORDS[n % 2 : 3 + n % 3]),
            "scores": [float((3 * k + n) % 4) for k in range(n % 2, 3 + n % 3)],
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("inputs") / "model")


def evaluate(model, rows, out, *flags):
    """What the command writes: metrics, and the lines of its only other file."""
    out.mkdir(exist_ok=True)
    path = out.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate_command.command(
        f"--model {model} --data {path} --out {out} --max-length 64 --batch-size 8 "
        f"{' '.join(flags)}".split()
    )
    (file,) = out.glob("eval_*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return json.loads((out / "metrics.json").read_text()), lines, file.name


def test_labeled_answers_are_evaluated_by_their_labels(model, tmp_path):
    rows = answers(11)
    metrics, lines, name = evaluate(model, rows, tmp_path / "out", "--beta", "0.5")
    assert name == "eval_answers.jsonl" and len(lines) == 11
    assert [line["desirable"] for line in lines] == [row["label"] for row in rows]
    rewards = [line["reward"] for line in lines]
    np.testing.assert_allclose(rewards, [0.5 * line["logps"] for line in lines])
    expected = area_under_curve([row["label"] for row in rows], rewards)
    assert metrics["rewards/auroc"] == pytest.approx(expected)
    assert (metrics["answers"], metrics["prompts"]) == (11, 6)
    good = np.mean([line["logps"] for line in lines if line["desirable"]])
    assert metrics["logps/desirable"] == pytest.approx(good, rel=1e-5)
    with pytest.raises(InputError, match="all 4 answers have the label true"):
        rows = [row | {"label": True} for row in answers(4)]
        evaluate(model, rows, tmp_path / "same")


def test_lists_are_evaluated_by_their_scores(model, tmp_path):
    rows = lists(9)
    metrics, lines, name = evaluate(model, rows, tmp_path / "out")
    assert name == "eval_lists.jsonl" and len(lines) == 9
    taus = []
    for row, line in zip(rows, lines):
        assert line["qualities"] == sorted(row["scores"], reverse=True)
        assert len(line["rewards"]) == len(line["lengths"]) == len(row["scores"])
        tau = scipy.stats.kendalltau(line["rewards"], line["qualities"]).statistic
        assert line["kendall_tau"] == pytest.approx(tau)
        taus.append(tau)
    assert metrics["rewards/kendall_tau"] == pytest.approx(np.mean(taus))
    assert metrics["lists"] == 9
    best = np.mean([line["logps"][0] for line in lines])
    assert metrics["logps/best"] == pytest.approx(best, rel=1e-5)

    # The same file as pairs, in the same folder.
    flags = ("--kind", "pairs", "--pairs", "all")
    pairs, lines, name = evaluate(model, rows, tmp_path / "out", *flags)
    assert name == "eval_pairs.jsonl"
    count = [
        sum(a > b for a, b in itertools.permutations(row["scores"], 2)) for row in rows
    ]
    assert pairs["pairs"] == len(lines) == sum(count)


def audited(path, folder, **options):
    """The pairs of a file that an audit judges, as texts."""
    config = AuditConfig(
        data=str(path), model=str(folder), out="unused", max_length=64, **options
    )
    opened = open_pairs(str(path), config, folder, None)
    return [opened.texts(n) for n in range(len(opened.pairs))]


def test_an_audit_judges_the_pairs_of_lists_and_refuses_single_answers(model, tmp_path):
    path = tmp_path / "lists.jsonl"
    row = {"prompt": "the film", "completions": [*WORDS[:3]], "ranks": [2, 1, 3]}
    path.write_text(json.dumps(row) + "\n")
    good, bad, was = WORDS[:3]
    found = [(x["chosen"], x["rejected"]) for x in audited(path, model, pairs="all")]
    assert found == [(bad, good), (bad, was), (good, was)]
    (worst,) = audited(path, model, pairs="best-worst")
    assert (worst["chosen"], worst["rejected"]) == (bad, was)
    path.write_text(json.dumps(answers(1)[0]) + "\n")
    with pytest.raises(InputError, match="holds single answers with labels, but an"):
        audited(path, model)


def test_what_a_file_holds_is_found_from_its_first_record(tmp_path):
    path = tmp_path / "data.jsonl"
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    renamed = {"q": "a", "answers": ["b", "c"], "points": [1, 2]}
    fields = ("prompt=q", "completions=answers", "scores=points")
    for record, options, kind in (
        (pair, {}, PAIRS),
        (answers(1)[0], {}, LABELED),
        (lists(1)[0], {}, LISTS),
        (pair | {"completions": ["b"], "scores": [1]}, {}, PAIRS),
        (renamed, {"fields": fields}, LISTS),
        ({"instruction": "a", "output": ["b", "c"]}, {}, PAIRS),
        ({"prompt": "a", "completions": ["b", "c"], "ranking": [1, 2]}, {}, PAIRS),
    ):
        path.write_text(json.dumps(record) + "\n")
        assert first_kind(str(path), RecordOptions(**options)) == kind
