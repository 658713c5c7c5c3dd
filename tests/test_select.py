"""`jaxpref data select` without a model: columns, votes, duplicates, FiFA."""

import json
import random

import numpy as np
import pytest
from scipy.spatial import cKDTree

from jaxpref import cli
from jaxpref.cli import data as data_command
from jaxpref.data import open_source
from jaxpref.errors import InputError
from jaxpref.select import duplicates, fifa
from jaxpref.select.config import SelectConfig
from jaxpref.select.run import run
from jaxpref.select.scores import Scores, by_row, choose
from tests.data_tokenizers import synthetic_pairs, write_lines


def select(folder, records, **options):
    """What is selected: the result, the indices of the records, and their scores."""
    write_lines(folder / "pairs.jsonl", records)
    out = folder / "chosen.jsonl"
    found = run(SelectConfig(data=f"{folder}/pairs.jsonl", out=str(out), **options))
    lines = (folder / "chosen.scores.jsonl").read_text().splitlines()
    scores = [json.loads(line) for line in lines]
    kept = [x["row"] - 1 for x in scores if x["kept"]]
    source = open_source(out)
    assert [source[n] for n in range(len(source))] == [records[n] for n in kept]
    assert found.kept == len(kept) and found.records == len(records) == len(scores)
    assert found.kept + sum(found.reasons.values()) == found.records
    return found, kept, scores


def pair(prompt="q", chosen="yes", rejected="no", **others):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **others}


# ---- which scores are kept ---------------------------------------------------------


def chosen(values, **options):
    reasons = ["" if np.isfinite(x) else "none" for x in values]
    asked = dict(keeps="highest", keep=None, low=None, high=None, seed=0) | options
    kept, reasons = choose(Scores(np.array(values), reasons), **asked)
    return np.flatnonzero(kept).tolist(), reasons


def test_bounds_come_before_keep():
    values = [3.0, np.nan, 1.0, 2.0, 9.0]
    assert chosen(values, low=2.0)[0] == [0, 3, 4]
    kept, reasons = chosen(values, high=3.0, keep=2)
    assert kept == [0, 3]
    assert reasons[1] == "none" and reasons[4] == "score above --max"
    assert reasons[2] == "score not among the highest of --keep"
    assert chosen(values, keep=2, keeps="lowest")[0] == [2, 3]
    # Half of the four that have a score.
    assert chosen(values, keep=0.5)[0] == [0, 4]
    assert chosen(values, keep=0.01)[0] == [4]
    with pytest.raises(InputError, match="--keep 5: only 4 records"):
        chosen(values, keep=5)
    with pytest.raises(InputError, match="no record is left"):
        chosen(values, low=10.0)


def test_equal_scores_are_drawn_by_the_seed():
    values = [1.0] * 200 + [2.0]
    draws = [chosen(values, keep=51, seed=seed)[0] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert all(200 in draw and len(draw) == 51 for draw in draws)
    # Neither the first nor the last ones: the mean of 50 draws of 0 to 199 has a
    # standard deviation of 7.1.
    assert abs(np.mean(draws[0][:-1]) - 99.5) < 30


def test_a_record_with_several_pairs_has_their_mean():
    found = by_row([0, 0, 3], {"score": [1, 2, 5], "x": [0, 4, 1]}, {1: "tie"}, 4)
    np.testing.assert_array_equal(found.values, [1.5, np.nan, np.nan, 5])
    np.testing.assert_array_equal(found.others["x"], [2, np.nan, np.nan, 1])
    assert found.reasons == ["", "tie", "no pair", ""]


# ---- columns and votes -------------------------------------------------------------


def test_by_column(tmp_path):
    values = [5, None, 2, 8.5, "3", True]
    records = [pair(meta={"score": x}) for x in values]
    found, kept, scores = select(
        tmp_path, records, by="column", column="meta.score", keep=2
    )
    assert kept == [0, 3]
    assert found.reasons == {
        "score not among the highest of --keep": 3,
        "no value in the field": 1,
    }
    assert [x["score"] for x in scores] == [5, None, 2, 8.5, 3, 1]
    assert found.scores["median"] == 3 and found.scores["kept_lowest"] == 5
    options = dict(by="column", column="meta.score", lowest=True, min=1.5)
    assert select(tmp_path, records, keep=0.5, **options)[1] == [2, 4]
    with pytest.raises(InputError, match="row 2: field 'a' must be a finite number"):
        select(tmp_path, [pair(a=1), pair(a="x")], by="column", column="a", min=0)
    skip = dict(on_bad_row="skip", by="column", column="a", min=0)
    found, kept, _ = select(tmp_path, [pair(a=1), pair(a="x")], **skip)
    assert kept == [0] and found.reasons == {"malformed": 1}


def test_several_files(tmp_path, capsys):
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    write_lines(tmp_path / "a.jsonl", [pair(f"q{n}", score=n) for n in (1, 5)])
    write_lines(tmp_path / "b.jsonl", [pair(f"q{n}", score=n) for n in (9, 2, 4)])
    out = tmp_path / "chosen.jsonl"
    options = ["--by", "column", "--column", "score", "--keep", "2"]
    data_command.command(["select", *names, *options, "--out", str(out)])
    source = open_source(out)
    assert [source[n]["score"] for n in range(len(source))] == [5, 9]
    lines = (tmp_path / "chosen.scores.jsonl").read_text().splitlines()
    places = [(x["file"], x["row"], x["score"]) for x in map(json.loads, lines)]
    a, b = names
    assert places == [(a, 1, 1), (a, 2, 5), (b, 1, 9), (b, 2, 2), (b, 3, 4)]
    assert "chosen.jsonl: 2 of 5 records" in capsys.readouterr().out
    config = dict(by="column", column="score", keep=2)
    with pytest.raises(InputError, match="b.jsonl.*this command reads"):
        run(SelectConfig(data=tuple(names), out=names[1], **config))
    with pytest.raises(InputError, match="files to select from have no weights"):
        SelectConfig(data=(f"{a}:1", f"{b}:2"), out=str(out), **config)
    # A record without the number is named with its own file and row.
    write_lines(tmp_path / "b.jsonl", [pair("q9", score="x")])
    with pytest.raises(InputError, match="b.jsonl row 1: field 'score'"):
        run(SelectConfig(data=tuple(names), out=str(out), **config))


def test_by_a_column_that_the_format_makes(tmp_path):
    """The margin of the best and the worst answer; the records stay as they are."""
    rated = lambda *scores: {
        "instruction": "q",
        "completions": [
            {"response": f"a{n}", "overall_score": x} for n, x in enumerate(scores)
        ],
    }
    records = [rated(9, 2, 4), rated(5, 5), rated(3, 8)]
    options = dict(by="column", column="margin", keep=1, pairs="best-worst")
    _, kept, scores = select(tmp_path, records, **options)
    assert kept == [0] and [x["score"] for x in scores][::2] == [7, 5]
    # With all pairs, the mean of 7, 5 and 2.
    _, _, scores = select(tmp_path, records, **options | {"pairs": "all"})
    assert scores[0]["score"] == pytest.approx(14 / 3)


def test_by_agreement(tmp_path):
    votes = lambda *labels: {
        "title": "t",
        "stance": "s",
        "a1": "one",
        "a2": "two",
        "votes": [{"worker": n, "label": x} for n, x in enumerate(labels)],
    }
    other = lambda *labels: votes(*labels) | {"title": "u"}
    third = lambda *labels: votes(*labels) | {"title": "v"}
    records = [votes("a1", "a1", "a2", "equal", "a1"), other("a1", "a2"), third("a2")]
    found, kept, scores = select(tmp_path, records, by="agreement", min=0.7)
    assert kept == [0] and scores[0] == {
        "row": 1,
        "kept": True,
        "score": 0.75,
        "votes": 4,
    }
    assert found.reasons == {
        "the votes have no majority": 1,
        "fewer than two votes on the pair": 1,
    }


def test_by_agreement_of_rows_with_a_vote_each(tmp_path):
    """Answers in either order are the same pair; whitespace of a prompt is no other."""
    records = [
        pair(annotator="a"),
        pair(annotator="b", prompt=" q "),
        pair(annotator="c", chosen="no", rejected="yes"),
        pair(prompt="r"),
        pair(chosen="yes", rejected="yes"),
    ]
    found, kept, scores = select(tmp_path, records, by="agreement", min=0.5)
    assert kept == [0, 1]
    shares = [x["score"] for x in scores]
    assert shares == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1, None])
    assert found.reasons["score below --min"] == 1
    with pytest.raises(InputError, match="no pair has more than one vote"):
        select(tmp_path, [pair(), pair("r")], by="agreement", min=0.5)


# ---- duplicates --------------------------------------------------------------------


def test_exact_duplicates(tmp_path):
    records = [
        pair("Name a color.", "Blue", "Seven"),
        pair("name  a\ncolor.", "blue ", "seven"),  # only case and whitespace differ
        pair("Name a color.", "Seven", "Blue"),  # the opposite label
        pair("Name a color.", "Red", "Blue", annotator="x"),
        pair("Name a color.", "Red", "Blue", annotator="y"),  # another vote
        pair("Name a color", "Blue", "Seven"),
        pair("Name a color.", "Blue", "Blue"),
    ]
    found, kept, scores = select(tmp_path, records, by="duplicates")
    assert kept == [0, 2, 3, 4, 5]
    assert scores[1]["duplicate_of"] == 1 and "score" not in scores[1]
    assert found.scores == {}
    assert found.reasons == {
        "same text as an earlier record": 1,
        "chosen and rejected are identical": 1,
    }
    _, kept, _ = select(tmp_path, records, by="duplicates", of="prompt")
    assert kept == [0, 5]
    lists = [{"prompt": "q", "completions": ["a", "b"], "scores": [1, 2]}] * 2
    assert select(tmp_path, lists, by="duplicates", kind="lists")[1] == [0]


def edited_texts(count=150, seed=0):
    """Texts of 8 to 40 words, of which two in three are edited copies of others."""
    rng = random.Random(seed)
    word = lambda: rng.choice("abcdefghijklmnop") + str(rng.randrange(9))
    texts = [[word() for _ in range(rng.randrange(8, 40))] for _ in range(count // 3)]
    while len(texts) < count:
        copy = [*rng.choice(texts)]
        for _ in range(rng.randrange(1, 4)):
            copy[rng.randrange(len(copy))] = word()
        texts.append(copy)
    rng.shuffle(texts)
    return [" ".join(text) for text in texts]


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates_are_those_of_all_comparisons(threshold):
    texts = edited_texts()
    near = duplicates.NearDuplicates(threshold, seed=0)
    found = [near.add(text, row) for row, text in enumerate(texts)]

    def grams(text):
        words = text.split()
        return {tuple(words[n : n + 3]) for n in range(len(words) - 2)}

    kept, missed = [], 0
    for row, text in enumerate(texts):
        share = lambda other, text=text: (
            len(grams(text) & grams(texts[other]))
            / len(grams(text) | grams(texts[other]))
        )
        similar = max((share(x) for x in kept), default=0.0)
        if found[row] is not None:
            # Never a false one.
            other, similarity = found[row]
            assert other in kept and similarity == pytest.approx(share(other))
            assert similarity >= threshold
        else:
            missed += similar >= threshold
            kept.append(row)
    assert 10 < sum(x is not None for x in found) < 120
    assert missed <= 3  # at most 1% of the pairs at the threshold, by the banding


def test_bands_miss_few_pairs_at_the_threshold():
    for threshold in (0.2, 0.5, 0.8, 0.95):
        width = duplicates.band_width(threshold)
        miss = lambda r, t=threshold: (1 - t**r) ** (128 // r)
        assert miss(width) <= 0.01 < miss(width + 1)


def test_near_duplicates_by_command(tmp_path):
    words = [f"w{n}" for n in range(60)]
    text = lambda change: " ".join(words[:change] + ["x"] + words[change + 1 :])
    records = [pair(text(n), "yes", "no") for n in (10, 20)] + [pair("short", "a", "b")]
    options = dict(by="duplicates", of="prompt")
    found, kept, scores = select(tmp_path, records, similarity=0.7, **options)
    # Of 58 3-grams each, 6 differ: 52 are common and 64 different.
    assert kept == [0, 2] and scores[1]["similarity"] == pytest.approx(52 / 64)
    assert found.reasons == {"nearly the text of an earlier record": 1}
    assert select(tmp_path, records, similarity=0.9, **options)[1] == [0, 1, 2]


# ---- FiFA --------------------------------------------------------------------------


def test_diversity_is_the_distance_to_the_kth_neighbor():
    points = np.random.default_rng(0).normal(size=(700, 5))  # more than one block
    points[3] = points[4]
    for k in (1, 5):
        distances, _ = cKDTree(points).query(points, k=k + 1)
        # Squares of norms cancel: an error of 1e-15 in a square is one of 1e-7.
        np.testing.assert_allclose(
            fifa.diversity(points, k), np.log1p(distances[:, k]), atol=1e-6
        )
    assert fifa.diversity(points[:3], 5) == pytest.approx(
        np.log1p(np.linalg.norm(points[:3, None] - points[:3], axis=-1).max(axis=1))
    )
    assert fifa.diversity(points[:1], 5).tolist() == [0]


def test_importance_is_the_weighted_sum_of_standardized_terms():
    rng = np.random.default_rng(1)
    margin, quality, spread = rng.normal(3, 2, size=(3, 50))
    z = lambda x: (x - np.mean(x)) / np.std(x)
    np.testing.assert_allclose(
        fifa.importance(margin, quality, spread, quality_weight=2, diversity_weight=3),
        z(margin) + 2 * z(quality) + 3 * z(spread),
    )
    # A constant term says nothing; units do not matter.
    np.testing.assert_allclose(
        fifa.importance(1e3 * margin, None, np.ones(50)), z(margin)
    )


def test_words_that_few_prompts_have_set_them_apart():
    texts = ["the cat sat"] * 20 + ["the dog sat", "quantum chromodynamics"]
    points = fifa.word_vectors(texts)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-6)
    found = fifa.diversity(points, 1)
    assert found[:20].max() < 1e-3 < found[20] < found[21]


def test_fifa_by_command(tmp_path):
    alike = [pair(f"describe the red house {n % 3}", m=0.1, q=5) for n in range(12)]
    records = [
        *alike,
        pair("describe the red house", m=9.0, q=5),
        pair("prove that every planar graph has four colors", m=0.1, q=5),
        pair("describe the red house 1", m=0.1, q=50),
        pair("no margin", q=5),
    ]
    options = dict(by="fifa", column="m", neighbors=3)
    found, kept, scores = select(tmp_path, records, keep=2, **options)
    assert kept == [12, 13] and found.reasons["no value in the field of --column"] == 1
    assert scores[0].keys() == {*"row kept score margin diversity reason".split()}
    _, kept, _ = select(tmp_path, records, keep=3, quality="q", **options)
    assert kept == [12, 13, 14]
    _, kept, _ = select(tmp_path, records, keep=1, diversity_weight=50, **options)
    assert kept == [13]
    with pytest.raises(InputError, match="no pair has a number in 'nope'"):
        select(tmp_path, records, by="fifa", column="nope", keep=1)


# ---- the command -------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        ("--by column --keep 5", "--by column: needs --column"),
        ("--by ches --keep 0.5", "--by ches: needs --model"),
        ("--by column --column x", "--by column: give --keep, --min or --max"),
        ("--by agreement --min 0.5 --column x", "--column: --by agreement does not"),
        ("--by duplicates --keep 5", "--keep: --by duplicates does not read it"),
        ("--by column --column x --keep 1.5", "--keep 1.5: must be a number of"),
        ("--by column --column x --keep 0", "--keep 0: must be a number of"),
        ("--by column --column x --min 2 --max 1", "--min 2.0: is above --max 1.0"),
        ("--by duplicates --similarity 0", "--similarity 0.0: must be above 0"),
        ("--by agreement --min 0.5 --kind answers", "--kind answers: --by agreement"),
        ("--by fifa --column x --keep 5 --batch-size 4", "no effect without --model"),
        ("--by fifa --column x --keep 5 --quality-weight 4", "without --quality"),
        ("--by column --column x --min 1 --out a.csv", "a.csv: give a name that ends"),
        ("--by column --column x --min 1 --out pairs.jsonl", "--out pairs.jsonl: is"),
        ("--by column --column x --min 1 --scores out.jsonl", "is also --out"),
        ("--by chess --keep 5", "--by"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "pairs.jsonl", synthetic_pairs(3))
    out = "" if "--out" in words else " --out out.jsonl"
    with pytest.raises(SystemExit):
        cli.main(f"data select pairs.jsonl {words}{out}".split())
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_the_command_prints_counts_and_writes_other_formats(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    records = [record | {"n": n} for n, record in enumerate(synthetic_pairs(10))]
    write_lines(tmp_path / "pairs.jsonl", records)
    words = "data select pairs.jsonl --by column --column n --keep 0.3 --out a.parquet"
    cli.main([*words.split(), "--scores", "scores.jsonl"])
    printed = capsys.readouterr().out
    assert "a.parquet: 3 of 10 records" in printed
    assert "score not among the highest of --keep" in printed
    assert "kept, lowest" in printed and "scores.jsonl" in printed
    source = open_source("a.parquet")
    assert [source[n]["n"] for n in range(len(source))] == [7, 8, 9]
