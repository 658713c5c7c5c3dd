"""Audits find planted flips and unreliable annotators, and report what is unknown."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from jaxpref import cli, data, report
from jaxpref.cli import audit as audit_command
from jaxpref.data import DataOptions, ListSource
from jaxpref.errors import InputError
from jaxpref.evaluate import audit, features
from jaxpref.evaluate.estimate import estimate
from jaxpref.evaluate.flips import auroc
from jaxpref.models import build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import weights_digest
from jaxpref.runtime.mesh import MeshConfig, make_mesh
from tests.tiny import make_model_folder

GOOD, BAD = "good great fine warm liked".split(), "bad dull cold hated".split()
REST = "the a film book meal was is and but it again with food plot".split()
RATES = {"ann": 0.02, "bob": 0.25, "eve": 0.6}
WORKERS = ("ann", "bob", "eve", "ann")


def records(count=240, seed=0):
    """Answers with good or bad words, and annotators with different flip rates."""
    rng = np.random.default_rng(seed)
    found = []
    for n in range(count):
        words = lambda some: " ".join(rng.choice([*some, *REST], rng.integers(5, 9)))
        name = WORKERS[n % 4]
        flip = bool(rng.random() < RATES[name])
        answers = [f" {rng.choice(some)} {words(some * 3)}" for some in (GOOD, BAD)]
        chosen, rejected = answers[::-1] if flip else answers
        found.append(
            {
                "prompt": " ".join(rng.choice(REST, 5)),
                "chosen": chosen,
                "rejected": rejected,
                "worker": name,
                "flip": flip,
                "extra": [n, "<b>&</b>"],
            }
        )
    return found


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, cache):
    """A complete audit by the command line."""
    folder = tmp_path_factory.mktemp("finished")
    path = write(folder / "pairs.jsonl", records())
    audit_command.command(
        f"--data {path} --model {model} --out {folder / 'out'} --max-length 64 "
        f"--annotator-field worker --features {cache}".split()
    )
    return folder


def run(folder, model, rows, **changes):
    settings = {"model": str(model), "out": str(folder / "out"), "max_length": 64}
    path = write(folder / "pairs.jsonl", rows)
    return audit.run(audit.AuditConfig(data=str(path), **(settings | changes)))


def test_planted_flips_are_found_and_annotators_ranked(finished):
    rows, out = records(), finished / "out"
    judged, summary = (
        read(out / "audit.jsonl"),
        json.loads((out / "summary.json").read_text()),
    )
    assert [row["row"] for row in judged] == list(range(1, len(rows) + 1))
    assert len({row["id"] for row in judged}) == len(rows)
    assert [row["annotator"] for row in judged] == [row["worker"] for row in rows]
    flips = np.array([row["flip"] for row in rows])
    p = np.array([row["p_correct"] for row in judged])
    area = scipy.stats.mannwhitneyu(p[~flips], p[flips]).statistic
    area /= flips.sum() * (~flips).sum()
    assert area > 0.9
    assert summary["known_flips"]["auroc"] == pytest.approx(area)
    worst = np.argsort(p, kind="stable")[: len(p) // 10]
    assert summary["known_flips"]["precision"] == pytest.approx(flips[worst].mean())

    assert [a["annotator"] for a in summary["annotators"]] == ["eve", "bob", "ann"]
    for found in summary["annotators"]:
        low, high = found["interval"]
        mine = [r["flip"] for r in rows if r["worker"] == found["annotator"]]
        assert low <= found["reliability"] <= high and found["count"] == len(mine)
        assert low - 0.05 <= 1 - np.mean(mine) <= high + 0.05
    low, high = summary["flip_rate_interval"]
    assert low <= summary["flip_rate"] <= high
    assert summary["model"]["accuracy"] > summary["length_only"]["accuracy"]


def test_the_clean_file_drops_suspicious_pairs(finished):
    rows, judged = records(), read(finished / "out" / "audit.jsonl")
    assert {row["action"] for row in judged} == {"keep", "drop"}
    assert all((row["action"] == "drop") == (row["p_correct"] < 0.5) for row in judged)
    remaining = [row for row, found in zip(rows, judged) if found["action"] == "keep"]
    assert read(finished / "out" / "clean.jsonl") == remaining
    flips = lambda some: np.mean([row["flip"] for row in some])
    assert flips(remaining) < 0.5 * flips(rows)


@pytest.mark.parametrize("action", ["relabel", "soft"])
def test_the_clean_file_preserves_all_other_fields(tmp_path, model, cache, action):
    same = {"extra": [1], "none": None}
    unjudged = {"prompt": "it", "chosen": " was", "rejected": " was"} | same
    rows = [*records(), unjudged]
    common = {"annotator_field": "worker", "features": str(cache)}
    run(tmp_path, model, rows, action=action, **common)
    judged, clean = (read(tmp_path / "out" / f"{x}.jsonl") for x in ("audit", "clean"))
    assert clean.pop() == unjudged and len(clean) == len(judged) == 240
    for row, found, made in zip(rows, judged, clean):
        if action == "soft":
            p = found["p_correct"]
            assert made == row | {"p_correct": p, "flip_rate": 1 - p}
        elif found["p_correct"] < 0.5:
            assert found["action"] == "relabel"
            assert made == row | {
                "chosen": row["rejected"],
                "rejected": row["chosen"],
                "flip": not row["flip"],
            }
        else:
            assert made == row


def test_the_report_is_complete(finished):
    page = (finished / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    for part in (
        "jaxpref audit --data",
        "--annotator-field worker",
        "length alone",
        "What does this file prefer?",
        "Annotators",
        "The 20 most suspicious pairs",
    ):
        assert part in page
    assert page.count('class="beside"') == 20
    assert "http" not in page.replace("http-equiv", "")
    # The annotators of the table have sections on a page of their own.
    people = (finished / "out" / "annotators.html").read_text()
    for number, name in enumerate(("eve", "bob", "ann"), 1):
        assert f'<a href="annotators.html#a{number}">{name}</a>' in page
        assert f'<section id="a{number}">' in people
        assert f"Annotator {name}" in people
    assert people.count('class="beside"') == 9
    table = (finished / "out" / "annotators.csv").read_text("utf-8-sig")
    names = [line.split(",")[0] for line in table.splitlines()[1:]]
    assert names == ["eve", "bob", "ann"]


def test_texts_side_by_side_are_escaped(tmp_path):
    part = report.SideBySide(
        [("left", "<script>\nx"), ("right", "&")], title="a < b", above="<i>" * 200
    )
    report.write_html(tmp_path / "page.html", "t", [report.Section("s", [part])])
    page = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;\nx" in page and "a &lt; b" in page
    assert "<script" not in page and "<i>" not in page and "<details>" in page


def test_features_equal_those_of_the_model_without_padding(tmp_path, model):
    rows = records(9)
    plan = data.make_splits(
        ListSource(rows),
        data.load_tokenizer(model),
        DataOptions(max_length=64, heldout_fraction=0.0),
    )
    found, network, params = compute(tmp_path, model, plan.train)
    for n in range(len(plan.train)):
        for side in range(2):
            prompt, answer = plan.train.prompt(n), plan.train.completion(n, side)
            tokens = np.concatenate([prompt, answer])[None]
            hidden = np.asarray(network.hidden(params, tokens), np.float64)[0]
            own = hidden[len(prompt) :]
            np.testing.assert_allclose(
                found.states[n, side], [*own.mean(0), *own[-1]], atol=2e-5
            )
            logits = np.asarray(network.logits(params, tokens), np.float64)[0]
            logps = scipy.special.log_softmax(logits, axis=-1)
            before = logps[len(prompt) - 1 : -1]
            total = before[np.arange(len(answer)), answer].sum()
            np.testing.assert_allclose(found.logps[n, side], total, rtol=1e-5)
            assert found.lengths[n, side] == len(answer)


def compute(folder, model, pairs):
    config = read_architecture(model)
    network = build(config)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        found = features.compute(
            pairs,
            features.make_feature_step(network),
            load_params(model, network),
            source="pairs",
            folder=folder,
            digest=weights_digest(model, "float32"),
            width=2 * config.hidden_size + 1,
            batch_size=8,
            mesh=mesh,
        )
    found = features.features_of(found, pairs)
    return found, network, load_params(model, network)


def test_an_interrupted_feature_pass_resumes(tmp_path, model, monkeypatch):
    rows = records(30)
    monkeypatch.setattr(features, "BLOCK", 8)
    real, calls = features._of_block, []

    def until_the_third(part, *rest):
        calls.append(len(part))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(part, *rest)

    monkeypatch.setattr(features, "_of_block", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model, rows)
    before = sum(calls[:2])
    again = run(tmp_path, model, rows)
    assert sum(calls[3:]) == 60 - before
    # A third run computes nothing, and neither does one with rows flipped and
    # reordered.
    calls.clear()
    calls.extend([0, 0, 0])
    same = run(tmp_path, model, rows)
    assert same.pairs == again.pairs
    other = [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows
    ]
    out = {"out": str(tmp_path / "two"), "features": str(tmp_path / "out/features")}
    run(tmp_path, model, other[::-1], **out)
    assert calls == [0, 0, 0]
    # A damaged file is computed again.
    path = next((tmp_path / "out/features").glob("*.npz"))
    path.write_bytes(path.read_bytes()[:100])
    assert run(tmp_path, model, rows).pairs == again.pairs
    assert len(calls) > 3


def test_votes_on_one_pair_share_features_and_truth(tmp_path, model):
    rows = [
        row | {"worker": f"w{vote}", "flip": False}
        | ({"chosen": row["rejected"], "rejected": row["chosen"]} if vote == 2 else {})
        for row in records(40)
        for vote in range(3)
    ]  # fmt: skip
    found = run(tmp_path, model, rows, annotator_field="worker")
    assert found.summary["pairs"] == 120 and found.summary["items"] == 40
    stored = sum(
        len(np.load(path)["ids"]) for path in (tmp_path / "out/features").glob("*")
    )
    assert stored == 80
    reliability = {
        a["annotator"]: a["reliability"] for a in found.summary["annotators"]
    }
    assert reliability["w2"] < 0.2 < 0.8 < min(reliability["w0"], reliability["w1"])


def simulated(rate, count, spread, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, spread, count)
    first = rng.random(count) < 1 / (1 + np.exp(-z))
    vote = first ^ (rng.random(count) < rate)
    return np.where(vote, z, -z)


def one_annotator(margins):
    count = len(margins)
    return estimate(
        margins,
        np.zeros(count, int),
        items=np.arange(count),
        orientation=np.ones(count, int),
        num_annotators=1,
        assumed_flip_rate=0.1,
    )


def test_the_rate_is_recovered_for_any_scale_of_the_margins():
    margins = 3 * simulated(0.2, 20_000, 3.0)
    found = one_annotator(margins)
    assert found.identified and found.reason is None
    assert found.flip_rate_interval[0] < 0.2 < found.flip_rate_interval[1]

    def nll(x):
        p = scipy.special.expit(margins / np.exp(x[0]))
        return -np.log(x[1] + (1 - 2 * x[1]) * p).sum()

    exact = {"xatol": 1e-6, "fatol": 1e-6}
    best = scipy.optimize.minimize(
        nll, [1.0, 0.2], method="Nelder-Mead", options=exact
    ).x
    assert found.temperature == pytest.approx(np.exp(best[0]), rel=1e-3)
    assert found.flip_rate == pytest.approx(best[1], abs=1e-3)
    odds = margins / np.exp(best[0]) + np.log((1 - best[1]) / best[1])
    np.testing.assert_allclose(found.posterior, scipy.special.expit(odds), atol=2e-3)


def test_small_margins_do_not_identify_the_rate():
    found = one_annotator(simulated(0.2, 2000, 0.3))
    assert not found.identified and "any flip rate from" in found.reason
    low, high = found.flip_rate_interval
    assert low < 0.2 < high
    # The posterior is based on the assumed rate.
    truth = scipy.special.expit(found.margins + np.log(0.9 / 0.1))
    np.testing.assert_allclose(found.posterior, truth, atol=1e-3)


def test_a_rate_whose_interval_includes_0_is_not_reported():
    """The interval is short enough, but it starts at 0."""
    found = one_annotator(simulated(0.05, 1000, 1.5))
    assert found.flip_rate_interval[0] < 0.005
    assert 0.1 < found.flip_rate_interval[1] < 0.25
    assert not found.identified and found.flip_rate is None
    clean = one_annotator(simulated(0.0, 20_000, 3.0))
    assert clean.identified and clean.flip_rate < 0.01


def test_uninformative_margins_leave_the_assumed_rate():
    rng = np.random.default_rng(0)
    count = 240
    found = estimate(
        rng.normal(size=count),
        np.arange(count) % 3,
        items=np.arange(count),
        orientation=np.ones(count, int),
        num_annotators=3,
        assumed_flip_rate=0.1,
    )
    assert not found.identified and found.flip_rate is None
    assert (found.reliability > 0.5).all() and (found.posterior > 0.5).mean() > 0.9


def test_a_single_prompt_is_uninformative(tmp_path, model):
    row = {"prompt": "the film", "chosen": " was good", "rejected": " was bad"}
    found = run(tmp_path, model, [row] * 12)
    assert found.summary["prompts"] == 1 and not found.summary["identified"]
    assert found.summary["flip_rate"] is None
    assert "every margin is 0" in found.summary["reason"]
    p = [row["p_correct"] for row in found.pairs]
    assert np.isfinite(p).all() and len(set(p)) == 1 and p[0] > 0.5


def test_three_pairs_give_a_result_without_a_rate(tmp_path, model, capsys):
    path = write(tmp_path / "three.jsonl", records(3))
    out = tmp_path / "out"
    audit_command.command(
        ["--data", str(path), "--model", str(model), "--out", str(out)]
    )
    assert "flip rate not identified" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert not summary["identified"] and len(read(out / "audit.jsonl")) == 3
    assert "do not determine" in (out / "report.html").read_text()
    for name in ("p_correct", "margin"):
        assert np.isfinite([row[name] for row in read(out / "audit.jsonl")]).all()


def test_a_single_annotator(tmp_path, model):
    rows = [row | {"worker": "ann"} for row in records(30)]
    found = run(tmp_path, model, rows, annotator_field="worker")
    (only,) = found.summary["annotators"]
    assert only["annotator"] == "ann" and only["count"] == 30


def test_rows_without_a_name_share_one_annotator(tmp_path, model):
    rows = records(30)
    for row in rows[::4]:
        del row["worker"]
    found = run(tmp_path, model, rows, annotator_field="worker")
    names = {a["annotator"]: a["count"] for a in found.summary["annotators"]}
    assert names == {None: 8, "ann": 7, "bob": 8, "eve": 7}


def fails(monkeypatch, capsys, *arguments) -> str:
    """The error line of a failing command."""
    monkeypatch.setattr(sys, "argv", ["jaxpref", "audit", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    (line,) = [x for x in error.splitlines() if x.startswith("jaxpref: error:")]
    assert "Traceback" not in error
    return line


def test_invalid_input_is_one_line(tmp_path, model, finished, monkeypatch, capsys):
    path = finished / "pairs.jsonl"
    ask = lambda *more, data=path, model=model, out=tmp_path / "new": fails(
        monkeypatch, capsys, "--data", data, "--model", model, "--out", out,
        "--max-length", 64, *more,
    )  # fmt: skip
    line = ask("--annotator-field", "annotator_id")
    assert "row 1" in line and "'annotator_id'" in line and "worker" in line
    assert "no such folder" in ask(model=tmp_path / "nowhere")
    assert "no such file" in ask(data=tmp_path / "nothing.jsonl")
    assert "--folds 1" in ask("--folds", 1)
    assert "--threshold 1.5" in ask("--threshold", 1.5)
    listed = [row | {"worker": ["ann"]} for row in records(3)]
    wrong = write(tmp_path / "wrong.jsonl", listed)
    assert "row 1: field 'worker'" in ask("--annotator-field", "worker", data=wrong)
    same = {"prompt": "it was", "chosen": " good", "rejected": " good"}
    equal = write(tmp_path / "equal.jsonl", [same] * 3)
    assert "chosen and rejected are identical 3" in ask(data=equal)
    line = ask("--annotator-field", "worker", "--seed", 1, out=finished / "out")
    assert "holds an audit with another config" in line and "seed" in line
    assert not (tmp_path / "new" / "audit.jsonl").exists()


def test_the_action_of_a_finished_audit_may_change(tmp_path, finished, model, cache):
    shutil.copytree(finished / "out", tmp_path / "out")
    found = audit.run(
        audit.AuditConfig(
            data=str(finished / "pairs.jsonl"),
            model=str(model),
            out=str(tmp_path / "out"),
            annotator_field="worker",
            features=str(cache),
            max_length=64,
            action="soft",
        )
    )
    assert {row["action"] for row in found.pairs} == {"soft"}


def test_weights_that_are_not_finite_are_reported(tmp_path, model):
    from safetensors.numpy import load_file, save_file

    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors = {name: np.full_like(value, np.nan) for name, value in tensors.items()}
    (damaged / "model.safetensors").unlink()
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(InputError, match="holds NaN"):
        run(tmp_path, damaged, records(3))
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_auroc_is_the_rank_statistic():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, 60).astype(float)
    positive = rng.random(60) < 0.3
    wins = scipy.stats.mannwhitneyu(scores[positive], scores[~positive]).statistic
    expected = wins / (positive.sum() * (~positive).sum())
    assert auroc(scores, positive) == pytest.approx(expected)
    assert np.isnan(auroc(scores, np.zeros(60, bool)))
