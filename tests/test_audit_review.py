"""Audits never report the mirror image, and say what they do to the file."""

import csv
import io
import json

import numpy as np
import pytest
import scipy.optimize
from scipy.special import expit, log_expit, logsumexp, xlog1py, xlogy

from jaxpref.cli import audit as audit_command
from jaxpref.errors import InputError
from jaxpref.evaluate import audit
from jaxpref.evaluate.crossfit import cross_fit, prompt_folds
from jaxpref.evaluate.estimate import estimate
from jaxpref.evaluate.flips import auroc
from jaxpref.evaluate.review import COLUMNS, plain_cell, review_csv, rule
from jaxpref.noise.calibration import fit_temperature_and_rate
from tests.test_audit import read, records, write
from tests.tiny import make_model_folder

# ---- several votes on a pair -------------------------------------------------------


def votes_on(pairs, *, rate, votes=3, signal=0.0, width=12, seed=0):
    """Cross-fitted margins of features that say as much as `signal` of the truth.

    Returns:
      The margin, item, side and truth of each vote: the side that it prefers, and
      whether it is right.
    """
    rng = np.random.default_rng(seed)
    truth = rng.choice([-1, 1], pairs)
    x = rng.normal(size=(pairs, width))
    x[:, 0] = signal * truth + rng.normal(size=pairs)
    items = np.repeat(np.arange(pairs), votes)
    right = rng.random(len(items)) >= rate
    side = np.where(right, truth[items], -truth[items])
    folds = [prompt_folds(map(str, items), folds=5, seed=seed + n) for n in (0, 1)]
    margins = cross_fit(side[:, None] * x[items], *folds).margins
    return margins, items, side, right


def judge(margins, items, side, annotators=None):
    annotators = np.zeros(len(items), int) if annotators is None else annotators
    return estimate(
        margins,
        annotators,
        items=items,
        orientation=side,
        num_annotators=int(annotators.max()) + 1,
        assumed_flip_rate=0.1,
    )


def check_no_mirror(found, right):
    """Right votes are more probably right, and no rate is above one half."""
    low, high = found.flip_rate_interval
    assert 0 <= low <= high <= 0.5
    assert found.flip_rate is None or found.flip_rate < 0.5
    assert found.reason is None or "any flip rate from 0." in found.reason
    assert auroc(found.posterior, right) > 0.5


@pytest.mark.parametrize("seed", range(2))
def test_few_pairs_with_three_votes_have_no_mirror_image(seed):
    """Cross-fitting on few pairs gives margins that contradict the labels."""
    margins, items, side, right = votes_on(30, rate=0.2, seed=seed)
    check_no_mirror(judge(margins, items, side), right)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 6])
@pytest.mark.parametrize("signal", [0.0, 1.0])
@pytest.mark.parametrize("pairs", [30, 60])
def test_no_seed_gives_the_mirror_image(pairs, signal, workers):
    for seed in range(20):
        margins, items, side, right = votes_on(
            pairs, rate=0.2, signal=signal, seed=seed
        )
        voters = np.random.default_rng(seed).integers(0, workers, len(items))
        found = judge(margins, items, side, voters)
        check_no_mirror(found, right)
        assert found.counts @ found.reliability / len(items) > 0.5


def test_margins_that_contradict_all_votes():
    _, items, side, right = votes_on(30, rate=0.2)
    truth = np.where(right, side, -side)
    found = judge(-3.0 * side * truth, items, side)
    check_no_mirror(found, right)
    # The margins are ignored, and the votes on a pair decide.
    agree = np.bincount(items, side)[items] * side
    assert (found.posterior[agree > 0] > 0.5).all()
    assert (found.posterior[agree < 0] < 0.5).all()
    assert found.identified and 0.1 < found.flip_rate < 0.3


def log_likelihood(margins, items, side, x, e):
    """Of votes, by adding up both truths of each item; x = log T."""
    total = 0.0
    for item in np.unique(items):
        d, z = side[items == item], (side * margins)[items == item].mean() / np.exp(x)
        of = [
            log_expit(truth * z)
            + xlog1py((d == truth).sum(), -e)
            + xlogy((d != truth).sum(), e)
            for truth in (1, -1)
        ]
        total += logsumexp(of)
    return total


def test_the_rate_of_several_votes_is_the_most_likely_one():
    margins, items, side, _ = votes_on(30, rate=0.25, signal=1.0, seed=7)
    scale, found = fit_temperature_and_rate(
        np.float32(margins), items=items, orientation=side
    )
    nll = lambda v: -log_likelihood(margins, items, side, v[0], expit(v[1]) / 2)
    exact = {"xatol": 1e-6, "fatol": 1e-8}
    tried = [
        scipy.optimize.minimize(nll, start, method="Nelder-Mead", options=exact)
        for start in ([-3.0, 0.0], [0.0, 0.0])
    ]
    best = min(tried, key=lambda one: one.fun)
    assert float(found.rate) == pytest.approx(expit(best.x[1]) / 2, abs=2e-3)
    assert float(scale.temperature) == pytest.approx(np.exp(best.x[0]), rel=2e-2)
    assert float(found.log_likelihood) == pytest.approx(-best.fun, abs=2e-3)

    def profile(e):
        at = lambda x: -log_likelihood(margins, items, side, x, e)
        return -scipy.optimize.minimize_scalar(at, bounds=(-3, 4), method="bounded").fun

    for end in (float(found.lower), float(found.upper)):
        assert profile(end) - -best.fun == pytest.approx(-(1.96**2) / 2, abs=0.05)


def test_one_vote_an_item_is_the_same_with_and_without_items():
    margins, items, side, _ = votes_on(90, rate=0.1, votes=1, signal=2.0)
    z = np.float32(margins)
    (one, alone), (other, given) = (
        fit_temperature_and_rate(z, **more)
        for more in ({}, {"items": items, "orientation": side})
    )
    for a, b in ((one.temperature, other.temperature), (alone.rate, given.rate)):
        assert float(a) == pytest.approx(float(b), rel=1e-3, abs=1e-4)
    assert float(alone.upper) == pytest.approx(float(given.upper), abs=1e-3)


def test_votes_alone_determine_the_rate():
    """Without margins, 3 e (1 - e) is the share of pairs with a dissenting vote."""
    items, dissent = np.repeat(np.arange(30), 3), 12
    side = np.ones(90, int)
    side[: 3 * dissent : 3] = -1
    _, found = fit_temperature_and_rate(
        np.zeros(90, np.float32), items=items, orientation=side
    )
    expected = (1 - np.sqrt(1 - 4 * dissent / 90)) / 2
    assert float(found.rate) == pytest.approx(expected, abs=1e-3)
    assert float(found.lower) < expected < float(found.upper) < 0.4
    _, found = fit_temperature_and_rate(np.zeros(90, np.float32))
    assert not bool(found.identified) and float(found.upper) == 0.5


# ---- the review list ---------------------------------------------------------------


@pytest.mark.parametrize(
    "text, cell",
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1 degree", "'-1 degree"),
        ("@SUM(A1)", "'@SUM(A1)"),
        (" \t=1", "'=1"),
        ("\r=1", "'=1"),
        ("\n\n@x", "'@x"),
        ("\uff1d1", "'\uff1d1"),
        ("a;=cmd|' /C calc'!A0", "a;'=cmd|' /C calc'!A0"),
        ("a; +1;-2", "a;' +1;'-2"),
        ("a = b", "a = b"),
        ("two\nlines", "two lines"),
        ("\x1b[2Jred\x00\u202e", "[2Jred"),
        ('say "hi", then', 'say "hi", then'),
        ("x" * 400, "x" * 300 + " …"),
        ("x" + " " * 5000 + "y", "x …"),
        ("", ""),
    ],
)
def test_a_cell_is_one_line_of_plain_text(text, cell):
    assert plain_cell(text) == cell


def test_the_table_is_read_back():
    record = {
        "rank": 1, "row": 7, "p_correct": 0.25, "margin": -1.5, "annotator": "=ann",
        "action": "drop", "prompt": 'a "b", c\nd', "chosen": "-x", "rejected": "é",
        "gain": 0.5, "id": "0a-0",
    }  # fmt: skip
    content = review_csv([record, record | {"rank": 2, "annotator": None}])
    assert content.startswith(b"\xef\xbb\xbf")
    first, second = csv.DictReader(io.StringIO(content.decode("utf-8-sig")))
    assert list(first) == list(COLUMNS)
    assert (first["rank"], first["row"]) == ("1", "7")
    assert (first["suspicion"], first["margin"]) == ("0.7500", "-1.5000")
    assert first["prompt"] == 'a "b", c d' and first["rejected"] == "é"
    assert (first["annotator"], first["chosen"]) == ("'=ann", "'-x")
    assert (first["gain"], first["verdict"], first["id"]) == ("0.5000", "", "0a-0")
    assert second["annotator"] == ""


def test_the_rule_in_words():
    sentence = rule("drop", 0, 9, threshold=0.5, top=None)
    assert sentence == (
        "0 of 9 pairs were dropped: those whose label is right with a probability "
        "below 0.5"
    )
    assert "3 of 9 pairs were relabeled: the most" in rule(
        "relabel", 3, 9, threshold=0.5, top=3
    )


# ---- whole audits ------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its cached features, and a file with flips."""
    folder = tmp_path_factory.mktemp("review")
    make_model_folder(folder / "model")
    write(folder / "pairs.jsonl", [r | {"worker": "ann"} for r in records()])
    return folder


def run(folder, out, **changes):
    return audit.run(
        audit.AuditConfig(
            data=str(folder / "pairs.jsonl"),
            model=str(folder / "model"),
            out=str(out),
            features=str(folder / "features"),
            max_length=64,
            **changes,
        )
    )


@pytest.mark.parametrize("action", ["drop", "relabel"])
def test_the_most_suspicious_pairs_are_acted_on(folder, tmp_path, action):
    found = run(folder, tmp_path / "out", action=action, action_top=60, top=50)
    by_rank = sorted(found.pairs, key=lambda row: row["rank"])
    assert [row["rank"] for row in by_rank] == list(range(1, 241))
    suspicion = [row["p_correct"] for row in by_rank]
    assert suspicion == sorted(suspicion)
    acted = {row["row"] for row in found.pairs if row["action"] == action}
    assert acted == {row["row"] for row in by_rank[:60]}
    rows, clean = read(folder / "pairs.jsonl"), read(tmp_path / "out" / "clean.jsonl")
    if action == "drop":
        assert clean == [r for n, r in enumerate(rows, 1) if n not in acted]
        flipped = lambda some: np.mean([row["flip"] for row in some])
        assert flipped(clean) < 0.6 * flipped(rows)
    else:
        swapped = [n for n, (a, b) in enumerate(zip(rows, clean), 1) if a != b]
        assert set(swapped) == acted and len(clean) == 240
    listed = (tmp_path / "out" / "review.csv").read_text("utf-8-sig")
    listed = list(csv.DictReader(io.StringIO(listed)))
    assert [int(row["row"]) for row in listed] == [row["row"] for row in by_rank[:50]]
    assert len(found.suspects) == 50
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["acted_on"]["pairs"] == summary["acted_on"]["top"] == 60
    assert "60 of 240 pairs were" in summary["acted_on"]["rule"]
    expected = sum(1 - row["p_correct"] for row in found.pairs)
    assert summary["expected_wrong"] == pytest.approx(expected)


def test_the_command_says_by_which_rule(folder, tmp_path, capsys):
    audit_command.command(
        f"--data {folder / 'pairs.jsonl'} --model {folder / 'model'} --max-length 64 "
        f"--out {tmp_path} --features {folder / 'features'} --threshold 1e-20 --top 7 "
        "--assumed-flip-rate 0.2".split()
    )
    said = capsys.readouterr().out
    assert (
        "clean.jsonl: 0 of 240 pairs were dropped: those whose label is right" in said
    )
    assert "review.csv: the 7 most suspicious pairs" in said
    assert "--action-top N" in said
    page = (tmp_path / "report.html").read_text()
    for words in (
        "The 7 most suspicious pairs",
        "labels are right more often than wrong",
        "0 of 240 pairs were dropped",
        "<code>review.csv</code>",
        "--action-top N",
    ):
        assert words in page
    assert page.count('class="beside"') == 7


def test_three_votes_on_few_pairs(folder, tmp_path):
    """The file that was reported: thirty pairs, three votes each, 20% wrong."""
    rng = np.random.default_rng(0)
    rows = []
    for row in records(30):
        sides = [row["chosen"], row["rejected"]]
        sides = sides[::-1] if row["flip"] else sides
        for vote in range(3):
            flip = bool(rng.random() < 0.2)
            chosen, rejected = sides[::-1] if flip else sides
            answers = {"chosen": chosen, "rejected": rejected}
            rows.append(row | answers | {"annotator": f"w{vote}", "flip": flip})
    write(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "model").symlink_to(folder / "model")
    found = run(tmp_path, tmp_path / "out")
    assert found.summary["items"] == 30
    assert found.summary["flip_rate_interval"][1] <= 0.5
    assert found.summary["known_flips"]["auroc"] > 0.7
    assert found.summary["assumption"] == "labels are right more often than wrong"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"top": 0}, "top 0: must be at least 1"),
        ({"action_top": 0}, "action_top 0: must be at least 1"),
        ({"action_top": 240}, "--action-top 240: must be below the 240 pairs"),
        ({"action_top": 3, "threshold": 0.5}, "give only one of them"),
        ({"action": "soft", "threshold": 0.5}, "--threshold 0.5: --action soft"),
        ({"action": "soft", "action_top": 3}, "--action-top 3: --action soft"),
        ({"threshold": 1.0}, "--threshold 1.0: must be"),
    ],
)
def test_options_that_contradict_each_other(folder, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        run(folder, tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "clean.jsonl").exists()
