"""The experiment on planted flips: its conversions, flips, intervals, and tables."""

import gzip
import json

import numpy as np
import pytest
import scipy.stats

from experiments import audits, audits_data
from experiments.audits_data import BY_ANNOTATOR, SYMMETRIC
from jaxpref.errors import InputError
from jaxpref.evaluate import audit
from tests.test_audit import records, write
from tests.tiny import make_model_folder

VOTES = [{"worker": "w", "label": x} for x in ("a1", "a2", "equal")]
PAIR = {"title": "t", "stance": "s", "a1": "x", "a2": "y", "votes": VOTES}
ROWS = {
    "HH helpful-base": [{"chosen": "c", "rejected": "r", "more": 1}],
    "UltraFeedback": [{"prompt": "p", "chosen": "c", "rejected": "r", "metadata": {}}],
    "UKP, one vote per pair": [PAIR | {"id": str(n)} for n in range(90)],
    "MT-bench votes": [
        {
            "prompt": ["p", "q"], "a": ["a", "b"], "b": ["c", "d"],
            "votes": [
                {"judge": "j", "winner": "b"},
                {"judge": "k", "winner": "tie"},
                {"judge": "l", "winner": "a"},
            ],
        }
    ],
    "GSM8K solutions": [
        {"idx": 1, "prompt": "p", "chosen": "c", "rejected": "r", "chosen_model": "m"}
    ],
    "LLaMA-Factory": [
        {
            "conversations": [
                {"from": "human", "value": "p"},
                {"from": "gpt", "value": "q"},
            ],
            "chosen": {"from": "gpt", "value": "c"},
            "rejected": {"from": "gpt", "value": "r"},
        }
    ],
    "QA feedback": [
        {
            "question": "p", "prediction 1": "a", "prediction 2": "b",
            "prediction 3": "c", "prediction 4": "b", "preference": [1, 2, 0, 2, 1, 1],
        }
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A made-up file for each dataset, in the form of the real one."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        path = folder / audits_data.FILES[name][0]
        if path.suffix == ".gz":
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            path.write_bytes(gzip.compress(lines.encode()))
        else:
            path.write_text(json.dumps(rows))
    return folder


def record(chosen, rejected, prompt="p"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HH helpful-base", [{"chosen": "c", "rejected": "r"}]),
        ("UltraFeedback", [record("c", "r")]),
        ("GSM8K solutions", [record("c", "r")]),
        ("LLaMA-Factory", [record("c", "r", "human: p\n\ngpt: q")]),
        # Ties and equal answers have no label.
        (
            "QA feedback",
            [record("a", "b"), record("c", "a"), record("c", "b"), record("c", "b")],
        ),
        (
            "MT-bench votes",
            [
                record("c\n\nd", "a\n\nb", "p\n\nq") | {"annotator": "j"},
                record("a\n\nb", "c\n\nd", "p\n\nq") | {"annotator": "l"},
            ],
        ),
    ],
)
def test_records_of_a_dataset(folder, name, expected):
    assert audits_data.read(folder, name, most=1000) == expected


def test_one_vote_per_pair_without_ties(folder):
    found = audits_data.read(folder, "UKP, one vote per pair", most=1000)
    assert 40 < len(found) < 80  # a third are ties
    assert {row["prompt"] for row in found} == {"t\n\ns"}
    assert {(row["chosen"], row["rejected"]) for row in found} == {
        ("x", "y"),
        ("y", "x"),
    }
    part = audits_data.read(folder, "UKP, one vote per pair", most=10)
    assert len(part) == 10 and all(row in found for row in part)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / audits_data.FILES["HH helpful-base"][0]).write_text("{")
    with pytest.raises(InputError, match="hh_rlhf.*cannot be read"):
        audits_data.read(tmp_path, "HH helpful-base", most=10)


def test_symmetric_flips_are_independent():
    nobody = [None] * 4000
    found, other = (
        audits_data.plant(nobody, rate=0.2, noise=SYMMETRIC, seed=seed)
        for seed in (0, 1)
    )
    assert found.annotators == nobody
    assert found.flips.mean() == pytest.approx(0.2, abs=0.02)
    assert (found.flips & other.flips).mean() == pytest.approx(0.04, abs=0.01)


@pytest.mark.parametrize("named", [False, True])
def test_half_of_the_annotators_have_twice_the_rate(named):
    names = [f"j{n % 8}" if named else None for n in range(20_000)]
    found = audits_data.plant(names, rate=0.3, noise=BY_ANNOTATOR, seed=0)
    by: dict[str | None, list[bool]] = {}
    for name, flip in zip(found.annotators, found.flips):
        by.setdefault(name, []).append(flip)
    assert len(by) == (8 if named else audits_data.ANNOTATORS)
    better, worse = np.split(np.sort([np.mean(flips) for flips in by.values()]), 2)
    np.testing.assert_allclose(better, 0.2, atol=0.05)
    np.testing.assert_allclose(worse, 0.4, atol=0.05)
    assert found.flips.mean() == pytest.approx(0.3, abs=0.01)


def test_a_stratified_interval():
    low, mean, high = audits.stratified([[1.0, 2.0, 3.0]])
    known = scipy.stats.t.interval(0.95, 2, loc=2, scale=1 / np.sqrt(3))
    assert (low, high) == pytest.approx(known) and mean == 2
    # Differences between strata are no noise.
    _, mean, high = audits.stratified([[1.0, 1.0], [5.0, 5.0]])
    assert mean == high == 3
    low, mean, high = audits.stratified([[1.0], [5.0]])
    assert mean == 3 and np.isnan([low, high]).all()


def test_intervals_cover_the_mean():
    rng, inside = np.random.default_rng(0), 0
    centers = rng.normal(size=6)
    for _ in range(1000):
        low, _, high = audits.stratified(rng.normal(centers[:, None], 1, (6, 3)))
        inside += low < centers.mean() < high
    assert 0.93 < inside / 1000 < 0.97


def run_of(seed, audit, length, tfidf, dataset="d"):
    areas = {"audit": audit, "length": length, "tfidf_lengths": tfidf}
    key = {"dataset": dataset, "noise": SYMMETRIC, "rate": 0.2, "seed": seed}
    return key | {"labels": 9, "auroc": areas}


def test_the_verdict_and_the_tables():
    runs = [run_of(n, 0.7 + n / 100, 0.6 + n / 100, 0.8 - n / 100) for n in range(3)]
    runs += [run_of(n, 0.7, 0.71 - n / 100, 0.6 + n / 100, "e") for n in range(3)]
    length, tfidf = audits.differences(runs)[:2]
    assert length["mean"] == pytest.approx(0.1) and length["low"] > 0
    assert tfidf["mean"] == pytest.approx(-0.08) and tfidf["high"] < 0
    lines = audits.markdown(audits.verdicts(runs)).splitlines()
    assert "| below TF-IDF and lengths |" in lines[2]
    assert "| not below any beyond noise |" in lines[3]
    rows = audits.table(runs)
    assert rows[0][3:] == ["**the audit**", "length", "TF-IDF and lengths"]
    assert rows[1] == [
        *("d", SYMMETRIC, "20%"),
        *("0.710 ± 0.010", "0.610 ± 0.010", "0.790 ± 0.010"),
    ]


def test_missing_data_are_named(tmp_path, capsys):
    with pytest.raises(InputError, match="no such dataset; expected HH"):
        audits.main(audits.Options(out=str(tmp_path), datasets=("mine",)))
    options = audits.Options(out=str(tmp_path), data_dir=str(tmp_path))
    with pytest.raises(InputError, match="benchmarks.inputs"):
        audits.main(options)
    assert "QA feedback is left out" in capsys.readouterr().out


@pytest.mark.slow
def test_an_audit_of_the_file_with_flips_says_the_same(tmp_path, capsys):
    """The experiment flips labels that are read once; here, the file is audited."""
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in records()]
    path = tmp_path / audits_data.FILES["UltraFeedback"][0]
    path.write_bytes(
        gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode())
    )
    options = audits.Options(
        data_dir=str(tmp_path),
        model=str(make_model_folder(tmp_path / "model")),
        out=str(tmp_path / "out"),
        max_length=64,
        smoke=True,
    )
    audits.main(options)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    said = capsys.readouterr().out
    assert (tmp_path / "out" / "tables.md").read_text() in said
    assert [run["noise"] for run in found["runs"]] == [SYMMETRIC, BY_ANNOTATOR]
    rows = audits_data.read(tmp_path, "UltraFeedback", most=150)
    for run in found["runs"]:
        how = {"rate": 0.2, "noise": run["noise"], "seed": 0}
        planted = audits_data.plant([None] * 150, **how)
        lines = []
        for row, flip, name in zip(rows, planted.flips, planted.annotators):
            if flip:
                row = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
            lines.append(row | {"flip": bool(flip), "annotator": name})
        write(tmp_path / "pairs.jsonl", lines)
        summary = audit.run(
            audit.AuditConfig(
                data=str(tmp_path / "pairs.jsonl"),
                model=options.model,
                out=str(tmp_path / run["noise"]),
                features=str(tmp_path / "out" / "features"),
                max_length=64,
            )
        ).summary
        area = summary["known_flips"]["auroc"]
        assert run["auroc"]["audit"] == pytest.approx(area, abs=1e-6)
        assert run["auroc"]["length"] == summary["baselines"]["length"]["auroc"]
        assert run["flipped"] == summary["known_flips"]["base_rate"]
    # Finished audits are not repeated.
    audits.main(options)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
