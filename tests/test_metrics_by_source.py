"""Held-out metrics of each of several sources."""

import numpy as np
import pytest

from jaxpref import losses, objectives
from jaxpref.data import DatasetBuilder
from jaxpref.data.mixing import short_names
from jaxpref.objectives import from_loss
from jaxpref.report.by_source import is_of_source, source_section
from jaxpref.train.evaluation import evaluation_metrics, make_evaluation
from tests.compiled import compiled

SOURCES = [0, 1, 1, 0, 1, 1, 1, 0]
NAMES = ("helpful", "harmless", "unused")


def dataset(sources, completions=2):
    builder = DatasetBuilder(completions)
    rng = np.random.default_rng(0)
    for n, source in enumerate(sources):
        answers = [rng.integers(1, 9, rng.integers(1, 6)) for _ in range(completions)]
        columns = {"source": source}
        builder.add([1], answers, id=f"pair-{n}", columns=columns)
    return builder.build()


def scored(count, completions=2):
    rng = np.random.default_rng(1)
    draw = lambda: rng.normal(-9, 3, (count, completions)).astype(np.float32)
    return {"policy_logps": draw()}, {"reference_logps": draw()}


@pytest.mark.parametrize("loss", [losses.dpo, losses.dr_dpo])
def test_each_source_is_evaluated_as_if_alone(loss):
    objective = from_loss(loss, beta=0.3)
    scores, reference = scored(len(SOURCES))
    evaluate = make_evaluation(objective)
    given = scores, reference, dataset(SOURCES), {}
    with compiled("evaluate") as programs:
        found = evaluation_metrics(evaluate, *given, sources=NAMES)
    assert len(programs) == 1  # of several sources
    whole = evaluation_metrics(evaluate, *given)
    assert found.items() >= whole.items()
    assert {n for n in found if n not in whole} == {
        f"eval_{metric}/{name}"
        for metric in ("loss", "rewards/accuracies", "rewards/margins")
        for name in NAMES[:2]
    }
    rewards = 0.3 * (scores["policy_logps"] - reference["reference_logps"])
    margin = rewards[:, 0] - rewards[:, 1]
    for n, name in enumerate(NAMES[:2]):
        own = margin[np.array(SOURCES) == n].astype(float)
        of = lambda metric, name=name: found[f"eval_{metric}/{name}"]
        assert of("rewards/margins") == pytest.approx(own.mean(), rel=1e-5)
        assert of("rewards/accuracies") == pytest.approx((own > 0).mean(), rel=1e-6)
        nll = np.logaddexp(0, -own)
        # dr_dpo couples the pairs: the soft minimum over those of the source.
        wanted = -np.log(np.exp(-nll).mean()) if loss is losses.dr_dpo else nll.mean()
        assert of("loss") == pytest.approx(wanted, rel=1e-5)


def test_the_loss_of_answers_is_per_token_of_the_source():
    pairs = dataset(SOURCES, completions=1)
    scores, _ = scored(len(SOURCES), completions=1)
    evaluate = make_evaluation(objectives.sft())
    found = evaluation_metrics(evaluate, scores, {}, pairs, {}, NAMES)
    own = np.array(SOURCES) == 1
    tokens = pairs.completion_lengths[own].sum()
    wanted = -scores["policy_logps"][own].sum() / tokens
    assert found["eval_loss/harmless"] == pytest.approx(wanted, rel=1e-5)


def test_one_source_has_no_metrics_of_its_own():
    scores, reference = scored(3)
    evaluate = make_evaluation(from_loss(losses.dpo))
    found = evaluation_metrics(
        evaluate, scores, reference, dataset([0] * 3), {}, ("one",)
    )
    assert not any(map(is_of_source, found))


def test_names_are_short_unless_they_are_equal():
    assert short_names(["a/x.jsonl", "b/y.jsonl.gz"]) == ["x", "y"]
    assert short_names(["a/x.jsonl", "b/x.csv"]) == ["a/x.jsonl", "b/x.csv"]
    assert short_names(["org/name", "b/.jsonl"]) == ["name", "b/.jsonl"]


def test_the_report_has_a_table_of_the_sources():
    record = {"step": 5, "eval_loss": 0.5, "eval_loss/x": 0.25, "eval_loss/y": 0.75}
    record |= {"eval_rewards/accuracies/x": 1.0, "eval_rewards/accuracies/y": None}
    section = source_section([record | {"step": 0}, record])
    (table,) = section.parts
    assert "step 5" in table.caption
    assert [row[0] for row in table.rows] == ["x", "y"]
    assert "0.25" in table.rows[0][1] and table.rows[1][2] is None
    assert source_section([{"step": 0, "eval_loss": 0.5}]) is None
    assert is_of_source("rewards/accuracies/x") and not is_of_source("rewards/margins")
