"""Agreement of annotators: published examples, brute force, and intervals."""

import csv
import io
import itertools
import re

import numpy as np
import pytest

from jaxpref import report
from jaxpref.evaluate.agreement import (
    agreement,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    pairwise_agreement,
    several,
    with_others,
)
from jaxpref.evaluate.annotators import (
    annotators_csv,
    beside_everyone,
    closer_look,
)
from jaxpref.evaluate.votes import Votes
from tests.test_report import Page

FLEISS = np.array(
    [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
)
"""Fourteen raters, ten subjects, five categories; kappa is 0.210."""
KRIPPENDORFF = (
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)
"""Four observers, twelve units (Krippendorff 2011, C); alpha is 0.743."""


def test_fleiss_kappa_of_a_published_example():
    found = fleiss_kappa(FLEISS, np.ones(10))
    assert found == pytest.approx(0.210, abs=5e-4)
    assert pairwise_agreement(FLEISS, np.ones(10)) == pytest.approx(0.378, abs=5e-4)


def test_krippendorffs_alpha_of_published_examples():
    units = zip(*(row.split() for row in KRIPPENDORFF))
    counts = np.array([[unit.count(k) for k in "12345"] for unit in units])
    counts = counts[counts.sum(axis=1) > 1]
    alpha = krippendorff_alpha(counts, np.ones(len(counts)))
    assert alpha == pytest.approx(0.743, abs=5e-4)
    # Krippendorff 2011, A: two observers, ten units, two values.
    one, two = map(
        np.array, ([0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, *[0] * 4])
    )
    counts = np.stack([2 - one - two, one + two], axis=1)
    alpha = krippendorff_alpha(counts, np.ones(10))
    assert alpha == pytest.approx(0.095, abs=5e-4)


def test_cohens_kappa_of_a_published_example():
    """Fifty proposals, read by two: 20 yes and yes, 5 yes and no, 10, 15; 0.4."""
    first = np.repeat([1, 1, 0, 0], [20, 5, 10, 15])
    second = np.repeat([1, 0, 1, 0], [20, 5, 10, 15])
    assert cohen_kappa(first, second, np.ones(50)) == pytest.approx(0.4)
    metrics = pytest.importorskip("sklearn.metrics")
    expected = metrics.cohen_kappa_score(first, second)
    assert cohen_kappa(first, second, np.ones(50)) == pytest.approx(expected)


def test_weights_count_items_several_times():
    """A bootstrap draw is the same as repeating its items."""
    rng = np.random.default_rng(0)
    weights = rng.multinomial(10, np.full(10, 0.1), size=3)
    sides = rng.integers(3, size=(2, 10))
    for statistic in (pairwise_agreement, fleiss_kappa, krippendorff_alpha):
        found = statistic(FLEISS, weights.astype(float))
        for one, draw in zip(found, weights):
            repeated = np.repeat(FLEISS, draw, axis=0)
            assert one == pytest.approx(statistic(repeated, np.ones(10)))
    found = cohen_kappa(*sides, weights.astype(float))
    for one, draw in zip(found, weights):
        repeated = np.repeat(sides, draw, axis=1)
        assert one == pytest.approx(cohen_kappa(*repeated, np.ones(10)))


def test_without_variation_nothing_is_known():
    counts = np.array([[3, 0], [2, 0]])
    assert np.isnan(fleiss_kappa(counts, np.ones(2)))
    assert np.isnan(krippendorff_alpha(counts, np.ones(2)))
    zeros = np.zeros(4, int)
    assert np.isnan(cohen_kappa(zeros, zeros, np.ones(4)))


def votes(count=60, seed=0):
    """Three to five votes an item; eve decides by a coin, and votes twice at times."""
    rng = np.random.default_rng(seed)
    names = ("ann", "bob", "cat", "dan", "eve", None)
    rows = []
    for item in range(count):
        truth = rng.choice([-1, 1])
        for k in rng.choice(5, rng.integers(1, 6), replace=False):
            right = rng.random() < (0.5 if k == 4 else 0.9)
            rows.append((k, item, truth if right else -truth))
            if k == 4 and item % 3 == 0:
                rows.append((k, item, -truth))
    rows += [(5, count + n, 1) for n in range(4)]
    rng.shuffle(rows)
    annotators, items, orientation = np.array(rows).T
    return votes_on(annotators, names, items, orientation)


def votes_on(annotators, names, items, orientation):
    """Votes on items, each with two answers of its own."""
    answers = 2 * items[:, None] + np.stack([orientation < 0, orientation > 0], 1)
    return Votes(annotators, names, items, items, orientation, answers)


def first_votes(given):
    """{item: {annotator: side}}, the first vote of each; by hand."""
    found = {}
    for k, item, side in zip(given.annotators, given.items, given.orientation):
        found.setdefault(item, {}).setdefault(k, side)
    return {item: by for item, by in found.items() if len(by) > 1}


def test_one_vote_of_each_annotator_on_items_with_several():
    given = votes()
    expected = first_votes(given)
    found = several(given)
    assert found.number == len(expected) and found.counts.sum() == len(found.items)
    for n, item in enumerate(sorted(expected)):
        mine = found.items == n
        assert (
            dict(zip(found.annotators[mine], 2 * found.sides[mine] - 1))
            == (expected[item])
        )


def test_agreement_by_brute_force():
    given = votes()
    items = list(first_votes(given).values())
    shares = [
        np.mean([a == b for a, b in itertools.combinations(by.values(), 2)])
        for by in items
    ]
    found = agreement(given)
    assert found["items"] == len(items) and found["annotators"] == 5
    assert found["votes"] == sum(map(len, items))
    assert found["pairwise"]["value"] == pytest.approx(np.mean(shares))
    # Chance agreement is 1/2, whichever answer comes first.
    kappa = 2 * np.mean(shares) - 1
    assert found["fleiss_kappa"]["value"] == pytest.approx(kappa)
    sizes = np.array([len(by) for by in items])
    count = 2 * sizes.sum()
    same = 2 * (count / 2) * (count / 2 - 1) / (count * (count - 1))
    alpha = 1 - sizes @ (1 - np.array(shares)) / sizes.sum() / (1 - same)
    assert found["krippendorff_alpha"]["value"] == pytest.approx(alpha)
    for name in ("pairwise", "fleiss_kappa", "krippendorff_alpha"):
        low, high = found[name]["interval"]
        assert low < found[name]["value"] < high
    width = np.subtract(*found["pairwise"]["interval"][::-1])
    error = np.std(shares) / np.sqrt(len(shares))
    assert width == pytest.approx(2 * 1.96 * error, rel=0.1)

    assert len(found["pairs"]) == 10
    most = [pair["items"] for pair in found["pairs"]]
    assert most == sorted(most, reverse=True)
    names = given.names
    for pair in found["pairs"]:
        a, b = map(names.index, pair["annotators"])
        both = [by[a] == by[b] for by in items if {a, b} <= by.keys()]
        assert pair["items"] == len(both) >= 10
        assert pair["agree"]["value"] == pytest.approx(np.mean(both))
        assert pair["cohen_kappa"]["value"] == pytest.approx(2 * np.mean(both) - 1)
        low, high = pair["agree"]["interval"]
        assert low < np.mean(both) < high or len(set(both)) == 1
        assert pair["cohen_kappa"]["interval"] == [2 * low - 1, 2 * high - 1]
    swapped = votes_on(given.annotators, names, given.items, -given.orientation)
    assert agreement(swapped) == found


def test_agreement_with_the_others_by_brute_force():
    given = votes()
    found = with_others(given)
    assert sorted(found) == [0, 1, 2, 3, 4]
    for k, record in found.items():
        shares = [
            np.mean([by[k] == side for other, side in by.items() if other != k])
            for by in first_votes(given).values()
            if k in by
        ]
        assert record["items"] == len(shares)
        assert record["agree"] == pytest.approx(np.mean(shares))
        low, high = record["interval"]
        assert low < record["agree"] < high
    assert min(found, key=lambda k: found[k]["agree"]) == 4


def test_single_votes_have_no_agreement():
    one = np.arange(3)
    given = votes_on(one, ("a", "b", "c"), one, np.ones(3, int))
    assert agreement(given) is None and with_others(given) == {}


# ---- a closer look at each annotator -----------------------------------------------


def record(name, **changes):
    others = {"items": 4, "agree": 0.75, "interval": [0.3, 0.95]}
    return {
        "annotator": name, "reliability": 0.5, "interval": [0.2, 0.8], "count": 9,
        "suspicious": 2, "expected_wrong": 3.5, "others": others,
    } | changes  # fmt: skip


def test_suspicious_pairs_of_each_annotator():
    names = ["bob", None, "ann", "bob", "bob", "bob", "ann"]
    order = np.array([3, 1, 6, 5, 0, 2, 4])
    annotators = [record("bob"), record(None), record("ann")]
    bob, ann = closer_look(annotators, [], names, order)
    assert bob["annotator"] == "bob" and bob["labels"] == [3, 5, 0]
    assert ann["labels"] == [6, 2] and ann["preferences"] == []


def test_preferences_that_differ_from_everyones():
    weight = lambda by, name, feature, at, half=0.1: {
        "by": by, "name": name, "feature": feature, "meaning": feature.upper(),
        "weight": at, "low": at - half, "high": at + half,
    }  # fmt: skip
    unknown = dict.fromkeys(("weight", "low", "high"))
    records = [
        weight("all labels", "", "length", 0.5),
        weight("all labels", "", "lists", 0.2),
        weight("all labels", "", "code", 0.0) | unknown,
        weight("annotator", "ann", "length", 0.6),
        weight("annotator", "ann", "lists", -0.4),
        weight("annotator", "ann", "code", 0.9),
        weight("annotator", "bob", "length", 3.0),
        weight("source", "ann", "length", 3.0),
    ]
    lists, length = beside_everyone(records, "ann")
    assert (lists["feature"], lists["weight"], lists["everyone"]) == (
        "lists",
        -0.4,
        0.2,
    )
    assert length["meaning"] == "LENGTH" and length["everyone"] == 0.5


def test_the_spreadsheet_of_annotators():
    content = annotators_csv([record("=ann"), record(None, others=None)])
    first, second = csv.DictReader(io.StringIO(content.decode("utf-8-sig")))
    assert first["annotator"] == "'=ann" and float(first["agree_high"]) == 0.95
    assert (first["votes"], first["suspicious"], first["low"]) == ("9", "2", "0.2")
    assert second["common_pairs"] == "0" and second["agree"] == ""


# ---- the page ------------------------------------------------------------------------

EVIL = '<script>alert("x")</script> & \'"> `<b>`'


def page_of(path, names, *, given=None):
    """The text of an annotators' page."""
    annotators = [record(name) for name in names]
    pair = {
        "annotator": EVIL, "row": 7, "p_correct": 0.25, "margin": -1.5,
        "prompt": EVIL, "chosen": EVIL, "rejected": EVIL,
    }  # fmt: skip
    weight = {"weight": 0.5, "low": 0.1, "high": 0.9, "everyone": -0.2}
    look = {"preferences": [weight | {"meaning": EVIL}], "suspects": [pair]}
    looks = [one | look for one in annotators if one["annotator"] is not None]
    summary = {"annotators": annotators, "agreement": given}
    report.write_annotators(path, summary, looks, data=EVIL)
    return path.read_text("utf-8")


def test_a_section_for_each_annotator(tmp_path):
    text = page_of(
        tmp_path / "page.html", ["ann", None, "bob"], given=agreement(votes())
    )
    assert re.findall(r'<section id="(\w+)"', text) == ["all", "a1", "a2"]
    links = re.findall(r'<a href="([^"]*)">([^<]*)', text)
    assert ("#a1", "ann") in links and ("#a2", "bob") in links
    assert ("report.html", "The report of this audit") in links
    assert not re.search(r"https?://|javascript:", text)
    page = Page(text)
    for words in (
        "not named",
        "Fleiss' kappa",
        "ann and bob",
        "+0.10 to +0.90",
        "−0.20",
    ):
        assert any(words in cell for cell in page.cells), words
    assert "0.75 (0.30 to 0.95)" in page.cells
    assert text.count('class="beside"') == 2


def test_names_and_texts_of_annotators_are_escaped(tmp_path):
    text = page_of(tmp_path / "page.html", [EVIL, "ann"])
    body, _, script = text.partition("<script>")
    assert "<script" not in body and "<b>" not in body and "<script" not in script
    seen = "".join(Page(body + "</body></html>").text)
    # Title twice; overview, heading of the section, and per section: meaning, pair
    # with title, prompt and two texts.
    assert seen.count('<script>alert("x")</script> & \'">') == 4 + 2 * 5
    assert "There is no" not in seen and "No pairs have votes of several" in seen


def test_links_are_escaped(tmp_path):
    table = report.Table(["a"], [[report.Link("`x` <i>", '#"><b>')]])
    section = report.Section("s", [table, report.Link("<i>", "#&")], anchor='"><b>')
    report.write_html(tmp_path / "page.html", "t", [section])
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "<b>" not in text and "<i>" not in text
    page = Page(text)
    assert page.links == ['#"><b>', "#&"] and page.cells == ["a", "x <i>"]
