"""Answers that recur in several pairs: strengths in the audit."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from scipy.special import expit

from jaxpref.evaluate import audit, recurring
from jaxpref.evaluate.estimate import estimate
from jaxpref.evaluate.flips import auroc
from jaxpref.evaluate.recurring import scores, with_strengths
from jaxpref.evaluate.votes import Votes
from jaxpref.report.audit import write_audit
from tests.test_audit import BAD, GOOD, REST

PROMPTS, ANSWERS = 16, 6  # 240 pairs, as in the other tests of audits
RELIABILITIES = np.array([0.95, 0.8, 0.5])


@dataclasses.dataclass(frozen=True)
class Simulated:
    """One vote on every pair of answers to a prompt; the text says little."""

    votes: Votes
    margins: np.ndarray
    wrong: np.ndarray


def simulated(seed: int) -> Simulated:
    rng = np.random.default_rng(seed)
    places = [
        (prompt * ANSWERS + i, prompt * ANSWERS + j)
        for prompt in range(PROMPTS)
        for i, j in itertools.combinations(range(ANSWERS), 2)
    ]
    first, second = np.array(places).T
    text = rng.normal(size=PROMPTS * ANSWERS)
    strength = text + rng.normal(0, 2.0, PROMPTS * ANSWERS)
    truth = rng.random(len(first)) < expit(strength[first] - strength[second])
    who = rng.integers(0, len(RELIABILITIES), len(first))
    wrong = rng.random(len(first)) >= RELIABILITIES[who]
    sign = np.where(truth ^ wrong, 1, -1)
    sides = np.where((sign > 0)[:, None], [*zip(first, second)], [*zip(second, first)])
    items = np.arange(len(first))
    names = [f"w{k}" for k in range(len(RELIABILITIES))]
    votes = Votes(who, names, items, items, sign, sides)
    return Simulated(votes, sign * (text[first] - text[second]), wrong)


def text_only(made: Simulated):
    return estimate(
        made.margins,
        made.votes.annotators,
        items=made.votes.items,
        orientation=made.votes.orientation,
        num_annotators=len(RELIABILITIES),
        assumed_flip_rate=0.2,
    )


def test_strengths_find_more_wrong_votes_and_better_reliabilities():
    areas, errors = [], []
    for seed in range(4):
        made = simulated(seed)
        before = text_only(made)
        after = with_strengths(before, made.votes, assumed_flip_rate=0.2)
        assert after.strengths is not None
        assert after.strengths.answers == PROMPTS * ANSWERS
        assert after.strengths.pairs_per_answer == ANSWERS - 1
        # The margins are still the judges'.
        assert (after.margins == before.margins).all()
        both = before, after
        areas.append([auroc(1 - found.posterior, made.wrong) for found in both])
        errors.append([np.abs(x.reliability - RELIABILITIES).mean() for x in both])
    (area, informed_area), (error, less) = np.mean(areas, 0), np.mean(errors, 0)
    assert informed_area > area + 0.05
    assert less < error


def test_answers_that_do_not_recur_change_nothing():
    made = simulated(0)
    found = text_only(made)
    alone = np.arange(2 * len(made.wrong)).reshape(-1, 2)
    votes = dataclasses.replace(made.votes, answers=alone)
    assert with_strengths(found, votes, assumed_flip_rate=0.2) is found
    # Several votes on the same two answers are one pair.
    both = np.stack([made.votes.items * 0, made.votes.items * 0 + 1], axis=1)
    votes = dataclasses.replace(made.votes, answers=both, texts=made.votes.items * 0)
    assert with_strengths(found, votes, assumed_flip_rate=0.2) is found


def test_copies_of_a_record_without_an_annotator_are_not_further_votes():
    made, half = simulated(0), PROMPTS * ANSWERS * (ANSWERS - 1) // 4
    place = np.concatenate([np.arange(half)] * 2)
    copies = dataclasses.replace(
        made.votes,
        annotators=np.full(2 * half, 2),
        names=["w0", "w1", None],
        texts=place,
        orientation=made.votes.orientation[place],
        answers=made.votes.answers[place],
    )
    found = dataclasses.replace(text_only(made), margins=made.margins[place])

    def margins(votes):
        compared = recurring._Compared(votes.answers, PROMPTS * ANSWERS, 5.0)
        return recurring._margins(found, votes, compared)[1]

    # Votes on two equal answers are left out; so are copies.
    sides = copies.answers.copy()
    sides[half:, 1] = sides[half:, 0]
    alone = dataclasses.replace(copies, answers=sides, texts=np.arange(2 * half))
    given, expected = margins(copies), margins(alone)
    np.testing.assert_allclose(given[:half], expected[:half], atol=1e-5)
    np.testing.assert_array_equal(given[half:], given[:half])
    assert np.abs(expected[:half]).max() > 0.5 and not expected[half:].any()


def test_margins_are_differences_of_the_scores():
    rng = np.random.default_rng(0)
    sides = np.array([*itertools.permutations(range(5), 2), (5, 6), (6, 5), (5, 6)])
    score = rng.normal(size=7)
    found = scores(sides, score[sides[:, 0]] - score[sides[:, 1]], count=7)
    for some in (slice(0, 5), slice(5, 7)):
        centered = score[some] - score[some].mean()
        np.testing.assert_allclose(found[some], centered, atol=1e-6)


def test_an_audit_uses_strengths_and_says_so(inputs, tmp_path):
    rng, words = np.random.default_rng(0), [*GOOD, *BAD, *REST]
    rows = [
        {
            "prompt": " ".join(words[prompt : prompt + 3]),
            "chosen": f" {words[max(pair)]}",
            "rejected": f" {words[min(pair)]}",
            "annotator": f"w{rng.integers(3)}",
        }
        for prompt in range(PROMPTS)
        for pair in itertools.combinations(range(ANSWERS), 2)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    config = audit.AuditConfig(
        data=str(path), model=str(inputs / "model"), out=str(out), max_length=64
    )
    found = audit.run(config)
    said = json.loads((out / "summary.json").read_text())["answer_strengths"]
    assert said["answers"] == 96 and said["pairs_per_answer"] == pytest.approx(5)
    write_audit(
        tmp_path / "page.html",
        found.summary,
        found.pairs,
        found.suspects,
        found.calibration,
        command="",
        data="pairs.jsonl",
    )
    assert "recur, each in 5.0 different pairs" in (tmp_path / "page.html").read_text()
