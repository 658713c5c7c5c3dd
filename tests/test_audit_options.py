"""Verified labels, verdicts, budgets, power, and baselines of an audit."""

import csv
import importlib.util
import io
import json

import numpy as np
import pytest
import scipy.stats

from jaxpref.cli import audit as audit_command
from jaxpref.errors import InputError
from jaxpref.evaluate import audit, baselines
from jaxpref.evaluate.flips import auroc
from jaxpref.evaluate.power import pairs_needed, votes_needed
from jaxpref.evaluate.review import actions, gains, worth_a_look
from jaxpref.evaluate.verdicts import read_verdicts, settle
from tests.test_audit import read, records, write
from tests.tiny import make_model_folder

# ---- power ---------------------------------------------------------------------------


@pytest.mark.parametrize("sd, width", [(2.5, 0.042), (1.0, 0.214)])
def test_pairs_needed_agree_with_simulated_intervals(sd, width):
    """10,000 labels at a rate of 0.2 gave these widths; see `noise.calibration`."""
    z = scipy.stats.norm.ppf((np.arange(2000) + 0.5) / 2000) * sd
    (one,) = pairs_needed(z, flip_rate=0.2, width=width, votes=(1,))
    assert one["pairs"] == pytest.approx(10_000, rel=0.1)


def test_known_truths_leave_a_binomial():
    """With margins that leave no doubt, every label says whether it is right."""
    z = np.full(50, 40.0)
    expected = 4 * 1.96**2 * 0.2 * 0.8 / 0.05**2
    found = votes_needed(z, flip_rate=0.2, width=0.05)
    assert found == pytest.approx(expected, rel=0.01)
    # Margins of a single size do not tell the rate of all labels from the temperature.
    (one,) = pairs_needed(z, flip_rate=0.2, width=0.05, votes=(1,))
    assert one["pairs"] is None


def test_margins_of_zero_need_several_votes():
    """Two votes agree with probability 1 - 2 e (1 - e), which determines e."""
    one, two = pairs_needed(np.zeros(9), flip_rate=0.2, width=0.02, votes=(1, 2))
    assert one["pairs"] is None
    disagree, slope = 0.32, 2 - 4 * 0.2
    variance = disagree * (1 - disagree) / slope**2
    assert two["pairs"] == pytest.approx(4 * 1.96**2 * variance / 0.02**2, rel=0.02)
    assert votes_needed(np.zeros(9), flip_rate=0.2, width=0.1) is None


# ---- budgets and actions -------------------------------------------------------------


def test_recycling_keeps_swaps_or_drops():
    p = np.array([0.9, 0.6, 0.5, 0.4, 0.1])
    found = actions(p, np.argsort(p), action="recycle", threshold=0.6, top=None)
    assert found.tolist() == ["keep", "keep", "drop", "relabel", "relabel"]


def test_gains_are_expected_labels():
    """Averaged over whether the label is right, with a look and without one."""
    p = np.array([0.9, 0.3, 0.2, 0.6])
    does = np.array(["keep", "drop", "relabel", "keep"])
    worth = {"keep": (1, -1), "drop": (0, 0), "relabel": (-1, 1)}
    alone = [
        q * (1 - worth[a][0]) + (1 - q) * (1 - worth[a][1]) for q, a in zip(p, does)
    ]
    texts = np.array([0, 1, 2, 0])
    expected = [alone[0] + alone[3], alone[1], alone[2], alone[0] + alone[3]]
    found = gains(p, does, texts)
    np.testing.assert_allclose(found, expected)
    order = np.argsort(p)
    # Two votes on the same texts take one look: the more suspicious of them is listed.
    assert worth_a_look(found, order, texts, budget=3).tolist() == [1, 3, 2]


# ---- verdicts ------------------------------------------------------------------------

KNOWN = {
    "rows": np.array([1, 2, 4]),
    "ids": np.array(["a-0", "b-0", "a-1"]),
    "texts": np.array([0, 1, 0]),
    "orientation": np.array([1, 1, -1]),
}


def listed(tmp_path, *lines, heading="row,verdict,id"):
    path = tmp_path / "review.csv"
    path.write_text("\n".join([heading, *lines]), "utf-8-sig")
    return path


def test_a_verdict_settles_all_votes_on_its_texts(tmp_path):
    path = listed(tmp_path, "1,Wrong,a-0", "2,,b-0")
    found = settle(read_verdicts(path), str(path), **KNOWN)
    assert found.tolist() == ["wrong", "", "right"]
    path = listed(tmp_path, "4;drop;a-1", heading="row;verdict;id")
    found = settle(read_verdicts(path), str(path), **KNOWN)
    assert found.tolist() == ["drop", "", "drop"]


@pytest.mark.parametrize(
    "lines, words",
    [
        (["1,maybe,a-0"], "row 2: verdict 'maybe'; write right, wrong, drop"),
        (["x,right,a-0"], "row 2: row 'x' is not a number"),
        (["2,right,b-0", "1,right,b-0"], "row 3: row 1 of the audited file is not"),
        (["3,right,c-0"], "row 2: row 3 of the audited file is not the record 'c-0'"),
        (["1,right,a-0", "4,right,a-1"], "row 3: contradicts row 2"),
    ],
)
def test_verdicts_that_cannot_be_applied(tmp_path, lines, words):
    path = listed(tmp_path, *lines)
    with pytest.raises(InputError, match=words):
        settle(read_verdicts(path), str(path), **KNOWN)


def test_a_list_without_verdicts(tmp_path):
    path = listed(tmp_path, "1,a-0", heading="row,id")
    with pytest.raises(InputError, match="no column 'verdict'"):
        read_verdicts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="save the review list as CSV UTF-8"):
        read_verdicts(path)


# ---- baselines -----------------------------------------------------------------------

needs = pytest.mark.skipif(bool(baselines.missing()), reason="needs the audit extra")


def worded(count=300, seed=0):
    """Answers of which the better one says "good"; 20% of the labels are flipped."""
    rng = np.random.default_rng(seed)
    rest = "a film book meal was is and but it again".split()
    pairs, flips = [], rng.random(count) < 0.2
    for flip in flips:
        answer = lambda word: " ".join(rng.permutation([word, *rng.choice(rest, 7)]))
        pair = (answer("good"), answer("bad"))
        pairs.append(pair[::-1] if flip else pair)
    return pairs, flips


@needs
def test_the_baselines_find_flips_out_of_fold():
    pairs, flips = worded()
    folds = np.arange(300) % 5
    margins = baselines.tfidf_lengths(pairs, folds)
    assert auroc(-margins, flips) > 0.95
    quality, wrong = baselines.confident_learning(margins)
    assert auroc(-quality, flips) > 0.95
    assert wrong == pytest.approx(flips.sum(), rel=0.3)
    # A fold's labels do not affect its margins.
    other = [p[::-1] if fold == 2 else p for p, fold in zip(pairs, folds)]
    again = baselines.tfidf_lengths(other, folds)
    np.testing.assert_allclose(again[folds == 2], -margins[folds == 2], atol=1e-3)


def test_missing_baselines_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert baselines.missing() == ("tfidf_lengths", "confident_learning")
    said = baselines.say_missing(baselines.missing())
    assert "scikit-learn and cleanlab" in said and '"jaxpref[audit]"' in said
    only = lambda name: None if name == "cleanlab" else object()
    monkeypatch.setattr(importlib.util, "find_spec", only)
    assert baselines.missing() == ("confident_learning",)


# ---- whole audits --------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    make_model_folder(folder / "model")
    write(folder / "pairs.jsonl", records())
    return folder


def run(folder, out, **changes):
    settings = {"data": str(folder / "pairs.jsonl"), "max_length": 64}
    return audit.run(
        audit.AuditConfig(
            model=str(folder / "model"),
            out=str(out),
            features=str(folder / "features"),
            **(settings | changes),
        )
    )


def test_a_budget_is_reviewed_and_applied(folder, tmp_path):
    out, truth = tmp_path / "out", [row["flip"] for row in records()]
    found = run(folder, out, budget=30, power=0.1, confounders="length")
    worth = found.summary["budget"]
    assert worth["pairs"] == 30
    assert worth["expected_gain"] > 1.3 * worth["expected_gain_at_random"]
    rows = list(
        csv.DictReader(io.StringIO((out / "review.csv").read_text("utf-8-sig")))
    )
    gain = [float(row["gain"]) for row in rows]
    assert len(rows) == 30 and gain == sorted(gain, reverse=True)
    assert sum(gain) == pytest.approx(worth["expected_gain"], abs=0.01)
    assert [n["votes_per_pair"] for n in found.summary["power"]["needed"]] == [
        1,
        2,
        3,
        5,
    ]

    for row in rows:
        row["verdict"] = "wrong" if truth[int(row["row"]) - 1] else "right"
    rows[0]["verdict"], rows[1]["verdict"] = "drop", ""
    with (out / "review.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    written = (out / "review.csv").read_bytes()
    with pytest.raises(InputError, match="holds 29 verdicts.*--apply"):
        run(folder, out)
    again = run(folder, out, apply=str(out / "review.csv"), budget=5)
    assert (out / "review.csv").read_bytes() == written
    said = again.summary["verdicts"]
    assert said["wrong"] + said["right"] == 28 and said["drop"] == 1
    judged = {row["row"]: row for row in again.pairs}
    before, after = read(folder / "pairs.jsonl"), read(out / "clean.jsonl")
    for row in rows[2:]:
        n = int(row["row"])
        assert judged[n]["action"] == ("relabel" if truth[n - 1] else "keep")
        assert judged[n]["p_correct"] == (0 if truth[n - 1] else 1)
        assert judged[n]["gain"] == 0
        by_extra = next(r for r in after if r["extra"] == before[n - 1]["extra"])
        assert not by_extra["flip"]
    assert judged[int(rows[0]["row"])]["action"] == "drop"
    assert again.summary["budget"]["pairs"] == 5


def test_verified_labels_judge_a_file_that_is_mostly_wrong(folder, tmp_path):
    """60% of the labels are wrong, which the labels alone could not show."""
    rng = np.random.default_rng(1)
    rows = []
    for row in records(240, seed=2):
        right, wrong = sorted([row["chosen"], row["rejected"]], key=good, reverse=True)
        flip = bool(rng.random() < 0.6)
        answers = (wrong, right) if flip else (right, wrong)
        rows.append(row | dict(zip(("chosen", "rejected"), answers)) | {"flip": flip})
    clean = [
        row | dict(zip(("chosen", "rejected"), sorted_by_truth(row)))
        for row in records(240)
    ]
    # One of the file's own pairs is verified, too.
    clean.append(rows[5] | dict(zip(("chosen", "rejected"), sorted_by_truth(rows[5]))))
    data, trusted = (tmp_path / name for name in ("pairs.jsonl", "trusted.jsonl"))
    write(data, rows), write(trusted, clean)
    found = run(folder, tmp_path / "out", data=str(data), trusted=str(trusted))
    summary = found.summary
    assert summary["trusted"]["pairs"] == 241 and summary["trusted"]["accuracy"] > 0.9
    assert summary["known_flips"]["auroc"] > 0.95
    low, high = summary["flip_rate_interval"]
    assert low < 0.6 < high and summary["flip_rate"] > 0.5
    did = {row["action"] for row in found.pairs}
    assert {"keep", "relabel"} <= did <= {"keep", "relabel", "drop"}
    own = found.pairs[5]
    assert own["verdict"] == ("wrong" if rows[5]["flip"] else "right")
    assert own["p_correct"] == (0 if rows[5]["flip"] else 1)
    kept = read(tmp_path / "out" / "clean.jsonl")
    assert np.mean([row["flip"] for row in kept]) < 0.1
    assert len(kept) > 200
    assert summary["acted_on"]["action"] == "recycle"
    assert "verified labels" in summary["assumption"]


def good(text):
    return sum(word in "good great fine warm liked" for word in text.split())


def sorted_by_truth(row):
    return sorted([row["chosen"], row["rejected"]], key=good, reverse=True)


def test_contradictory_verified_labels(folder, tmp_path):
    row = records(1)[0]
    other = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    trusted = write(tmp_path / "trusted.jsonl", [row, other])
    with pytest.raises(InputError, match="trusted.jsonl row 2: contradicts"):
        run(folder, tmp_path / "out", trusted=str(trusted))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"budget": 0}, "budget 0: must be at least 1"),
        ({"power": 0.5}, "--power 0.5: must be above 0 and below 0.5"),
        ({"confounders": "length,lenth"}, "'lenth' is none of annotator, source"),
        ({"action": "recycle", "action_top": 3}, "--action recycle treats every pair"),
        ({"action": "recycle", "threshold": 0.5}, "must be above 0.5 with"),
    ],
)
def test_options_that_cannot_be(folder, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        run(folder, tmp_path / "out", **changes)


def test_the_command_says_what_it_did(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(baselines, "missing", lambda: tuple(baselines.NEEDS))
    audit_command.command(
        f"--data {folder / 'pairs.jsonl'} --model {folder / 'model'} --max-length 64 "
        f"--out {tmp_path} --features {folder / 'features'} --budget 9 --power 0.1 "
        "--annotator-field worker --confounders length,annotator".split()
    )
    said = capsys.readouterr().out
    for words in (
        "review.csv: the 9 pairs that are most worth reviewing; expected gain",
        "that is 0.1 wide, at a rate of",
        'pip install "jaxpref[audit]"',
    ):
        assert words in said
    page = (tmp_path / "report.html").read_text()
    for words in (
        "What does this file prefer?",
        "Held fixed: length, annotator.",
        '<option value="all labels" selected>',
        '<option value="annotator: bob">',
        "script-src 'sha256-",
        "Baselines not computed",
    ):
        assert words in page
    assert page.count("<script>") == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["baselines"]["tfidf_lengths"] is None
    assert set(summary["features"]) == {"length", "surface", "words", "states"}
    assert summary["features"]["states"]["auroc"] > 0.5
    assert summary["confounders"] == ["length", "annotator"]
    names = csv.DictReader(
        io.StringIO((tmp_path / "preferences.csv").read_text("utf-8-sig"))
    )
    assert {row["by"] for row in names} == {"all labels", "annotator", "model"}
